"""Averages of adapters of other people's making: by their products, or merged, and each kind computes what it should."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.compare.average import average
from finetune.compare.average_choice import Choices
from finetune.errors import FinetuneError
from finetune.model import base
from finetune.recipe.schema import Base
from finetune.store.checkpoints.manifest import read
from finetune.store.checkpoints.verify import verify
from finetune.training.opened import open_model
from tests.compare.test_average import OFTEN, SHORT
from tests.model.test_base_adapters import MERGED, adapter, edit, logits
from tests.stories.test_experts import FUSED, random_base

__all__ = ["adapter", "random_base"]
ADAPTERS = {"lora", "scaled by rank"}
SAME = {"an orthogonal start", "tied embeddings of its own"}  # as others, to an average
KINDS = {
    name: each for name, each in MERGED.items() if name == "a larger vocabulary" or not {"rows", *SAME} & {*each, name}
}


@pytest.fixture
def pair(adapter, tmp_path):
    """A function that makes two adapters of a kind with other numbers in them."""

    def pair(**settings):
        first, _ = adapter(**settings)
        first = first.rename(tmp_path / "first")
        second = shutil.copytree(first, tmp_path / "second")
        shifted(second)
        return first, second

    return pair


def shifted(directory) -> None:
    from safetensors.torch import save_file

    path = directory / "adapter_model.safetensors"
    torch.manual_seed(2)
    tensors = {
        name: one + 0.1 * torch.randn_like(one) if one.is_floating_point() else one
        for name, one in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def merged(path):
    """The model of an adapter merged onto its base, as if it were the base of a recipe."""
    named = Base(checkpoint=str(path))
    return base.load_model(base.directory(named, base.pin(named)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_any_kind_computes_what_the_mean_of_its_merged_weights_does(kind, pair, tmp_path) -> None:
    first, second = pair(**KINDS[kind])
    one = average([str(first)], Choices(), tmp_path / "one")
    assert one["form"] == ("adapter" if kind in ADAPTERS else "whole weights")
    exactly = 0.0 if kind in ADAPTERS else 1e-5
    trained = logits(open_model(str(first)).model)
    torch.testing.assert_close(logits(open_model(one["ref"]).model), trained, rtol=exactly, atol=exactly)
    same = shutil.copytree(first, tmp_path / "same")
    twice = average([str(first), str(same)], Choices(weights=(1, 3)), tmp_path / "twice")
    torch.testing.assert_close(logits(open_model(twice["ref"]).model), trained, rtol=1e-5, atol=1e-5)
    both = average([str(first), str(second)], Choices(weights=(1, 3)), tmp_path / "both")
    expected, other = merged(first), merged(second).state_dict()
    expected.load_state_dict(
        {name: 0.25 * tensor + 0.75 * other[name] for name, tensor in expected.state_dict().items()}
    )
    torch.testing.assert_close(logits(open_model(both["ref"]).model), logits(expected), rtol=1e-4, atol=1e-4)
    assert not verify(tmp_path / "both")


def test_the_same_ref_twice_is_the_ref_itself(pair, tmp_path) -> None:
    first, _ = pair(r=4, target_modules="all-linear", use_rslora=True)
    average([str(first), str(first)], Choices(), tmp_path / "twice")
    one, two = (load_file(each / "adapter_model.safetensors") for each in (first, tmp_path / "twice"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_ranks_add_up_and_the_scale_is_one(pair, tmp_path) -> None:
    first, second = pair(r=4, lora_alpha=12, target_modules="all-linear", use_rslora=True)
    average([str(first), str(second)], Choices(), tmp_path / "both")
    config = json.loads((tmp_path / "both/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    manifest = read(tmp_path / "both").manifest
    assert [(each["ref"], each["weight"]) for each in manifest.members] == [("first", 0.5), ("second", 0.5)]
    assert manifest.members[0]["digest"].startswith("blake3:")


def test_a_smaller_rank_says_what_it_loses(pair, tmp_path) -> None:
    first, second = pair(r=4, target_modules=["q_proj"])
    whole = average([str(first), str(second)], Choices(is_merged=True), tmp_path / "whole")
    assert whole["form"] == "whole weights"
    below = base.load_model(base.directory(*base.beneath(first, "first"))).state_dict()
    change = {
        name: one - below[name] for name, one in open_model(whole["ref"]).model.state_dict().items() if "q_proj" in name
    }
    for rank in (8, 3):
        small = average([str(first), str(second)], Choices(rank=rank), tmp_path / f"rank-{rank}")
        found = open_model(small["ref"]).model.merge_and_unload().state_dict()
        left = {name: found[name] - below[name] - one for name, one in change.items()}
        norm, lost = (sum(float(one.square().sum()) for one in each.values()) ** 0.5 for each in (change, left))
        assert small["lost"] == pytest.approx(lost / norm, abs=1e-5)
        assert (rank == 8) == (small["lost"] < 1e-6)
        factors = load_file(tmp_path / f"rank-{rank}/adapter_model.safetensors")
        assert {min(one.shape) for one in factors.values()} == {rank}


def test_many_adapters_become_whole_weights(pair, tmp_path) -> None:
    first, second = pair(r=16, target_modules="all-linear")
    made = average([str(first), str(second)], Choices(), tmp_path / "both")
    assert made["form"] == "whole weights"
    assert made["notes"][0].startswith("whole weights, because an adapter of rank 32 has more numbers")


def test_members_that_do_not_fit_are_refused_by_name(pair, tiny_base, tmp_path) -> None:
    first, second = pair(r=2, target_modules=["q_proj"])
    other = shutil.copytree(tiny_base, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    edit(second, base_model_name_or_path=str(other))
    with pytest.raises(FinetuneError, match=rf"{second}: begins with another base than {first}"):
        average([str(first), str(second)], Choices(), tmp_path / "both")
    edit(second, base_model_name_or_path=str(tiny_base))
    tokenizer = json.loads((second / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-3]
    (second / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        FinetuneError, match=f"{second}: has another tokenizer than {first}: they differ in vocabulary or rules"
    ):
        average([str(first), str(second)], Choices(), tmp_path / "both")
    with pytest.raises(FinetuneError, match="no member is part of a run, so the average has no place"):
        average([str(first), str(first)], Choices())
    with pytest.raises(FinetuneError, match=f"{first}: is not part of a run, so its base is unknown"):
        average([str(first)], Choices(with_base=0.5), tmp_path / "both")
    assert not (tmp_path / "both").exists() and not list(tmp_path.glob(".both*"))


@pytest.mark.slow
def test_whole_models_of_other_shapes_are_refused_by_name(tiny_base, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(310)
    other = shutil.copytree(tiny_base, tmp_path / "other")
    model.save_pretrained(other)
    with pytest.raises(
        FinetuneError, match=r"other: `model.embed_tokens.weight` has the shape \[310, 32\], and \[300, 32\]"
    ):
        average([str(tiny_base), str(other)], Choices(), tmp_path / "both")


@pytest.mark.slow
def test_experts_in_one_tensor_are_averaged_each_by_its_products(random_base, recipe_file, train, tmp_path) -> None:
    named = {"checkpoint": str(random_base("qwen3_moe"))}
    run = train(recipe_file(base=named, adapter=FUSED, train=SHORT | {"steps": 2}, checkpoint=OFTEN), tmp_path / "run")
    made = average([f"{run}@1", f"{run}@2"], Choices(weights=(1, 3)))
    assert made["form"] == "adapter"
    expected, other = (merged(run / f"checkpoints/step-0000000{step}") for step in (1, 2))
    other = other.state_dict()
    mean = {name: 0.25 * tensor + 0.75 * other[name] for name, tensor in expected.state_dict().items()}
    change = max(
        (mean[name] - tensor).abs().max() for name, tensor in expected.state_dict().items() if "experts" in name
    )
    expected.load_state_dict(mean)
    torch.testing.assert_close(logits(open_model(made["ref"]).model), logits(expected), rtol=1e-4, atol=1e-4)
    assert change > 1e-3
    whole = average([f"{run}@1", f"{run}@2"], Choices(weights=(1, 3), is_merged=True))
    torch.testing.assert_close(logits(open_model(whole["ref"]).model), logits(expected), rtol=1e-4, atol=1e-4)
    small = average([f"{run}@1", f"{run}@2"], Choices(weights=(1, 3), rank=8))
    torch.testing.assert_close(logits(open_model(small["ref"]).model), logits(expected), rtol=1e-4, atol=1e-4)
