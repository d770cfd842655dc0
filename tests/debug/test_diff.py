"""Two checkpoints side by side: what is the same is zero, what is not is measured, and runs part at the right step."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.debug import weight_changes
from finetune.debug.branch import Choices, branch
from finetune.debug.diff import diff, listing

TRAIN = {"steps": 12, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
FULL = {"adapter": None, "optimizer": {"learning_rate": 0.001}}


@pytest.fixture
def trained(recipe_file, train_once, tmp_path):
    def trained(name="run", **sections):
        return train_once(
            recipe_file(name, train=TRAIN, checkpoint={"every": "4 steps", "keep": {"last": 9}}, **sections),
            tmp_path / name,
        )

    return trained


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, FULL], ids=["lora", "full"])
def test_a_checkpoint_does_not_differ_from_itself(trained, sections) -> None:
    run = trained(**sections)
    facts = diff(f"{run}@8", f"{run}@8")
    assert facts["weights"]["total"]["change"] == 0 == facts["weights"]["total"]["relative"]
    assert facts["recipe"] == facts["plan"] == [] and facts["first_differing_step"] is None
    assert "equal in all" in listing(facts)


def test_the_change_of_whole_weights_is_the_norm_of_their_difference(trained) -> None:
    run = trained(**FULL)
    facts = diff(f"{run}@4", f"{run}@12")
    before, after = (load_file(run / f"checkpoints/step-{step:08d}/model.safetensors") for step in (4, 12))
    for entry in facts["weights"]["tensors"]:
        difference = after[entry["name"]] - before[entry["name"]]
        assert entry["change"] == pytest.approx(float(difference.norm()), rel=1e-5)
        assert entry["relative"] == pytest.approx(float(difference.norm() / before[entry["name"]].norm()), rel=1e-5)
        assert entry["largest"] == float(difference.abs().max())
    squares = sum(entry["change"] ** 2 for entry in facts["weights"]["modules"])
    assert facts["weights"]["total"]["change"] == pytest.approx(math.sqrt(squares))
    assert [entry["name"] for entry in facts["weights"]["modules"]] == ["embed_tokens", "layers.0", "layers.1", "norm"]


def test_an_adapter_is_measured_by_what_it_adds_to_the_base(trained) -> None:
    from finetune.training.opened import open_model

    run = trained()
    facts = diff(f"{run}@0", f"{run}@12")
    merged = open_model(f"{run}@12").model.merge_and_unload().state_dict()
    plain = open_model(f"{run}@0").model.state_dict()
    assert len(facts["weights"]["tensors"]) == 14
    for entry in facts["weights"]["tensors"]:
        difference = merged[entry["name"]] - plain[entry["name"]]
        assert entry["change"] == pytest.approx(float(difference.norm()), rel=1e-4)
        assert entry["relative"] == pytest.approx(float(difference.norm() / plain[entry["name"]].norm()), rel=1e-4)


def test_factors_that_are_turned_add_the_same(trained, tmp_path) -> None:
    import shutil

    run = trained()
    turned = tmp_path / "turned"
    shutil.copytree(run / "checkpoints/step-00000012", turned)
    (turned / "manifest.json").unlink()
    tensors = load_file(turned / "adapter_model.safetensors")
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    turned_ones = {
        name: (rotation @ value if "lora_A" in name else value @ rotation.T).contiguous()
        for name, value in tensors.items()
    }
    (turned / "adapter_model.safetensors").unlink()
    save_file(turned_ones, turned / "adapter_model.safetensors", {"format": "pt"})
    one = weight_changes.weights_of(run / "checkpoints/step-00000012")
    two = weight_changes.Weights(weight_changes._products(turned), True, turned, one.base)
    found, others = weight_changes.changes(one, two)
    assert not others
    assert all(item.change < 1e-5 * max(1e-3, item.norm) for item in found)


@pytest.mark.slow
def test_runs_part_where_a_branch_begins_to_differ(trained) -> None:
    run = trained()
    made = branch(f"{run}@4", None, Choices(("optimizer.learning_rate=0.001",)))
    facts = diff(f"{run}@12", f"{made}@12")
    assert facts["recipe"] == [{"key": "optimizer.learning_rate", "a": 0.01, "b": 0.001}]
    assert (facts["first_differing_step"]["step"], facts["first_differing_step"]["quantity"]) == (5, "learning_rate")
    assert facts["weights"]["total"]["change"] > 0
    assert facts["metrics"]["loss"]["a"] != facts["metrics"]["loss"]["b"]
    text = listing(facts)
    assert "the runs part at step 5" in text and "furthest tensors" in text


def test_other_models_are_told_apart_by_their_tensors(trained, tiny_base, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "short")
    facts = diff(str(tiny_base), str(tmp_path / "short"))
    assert all("layers.1." in name for name in facts["weights"]["others"]["only in A"])
    assert "only in A" in listing(facts)


@pytest.mark.slow
def test_a_picture_has_the_same_bytes_each_time(trained, tmp_path) -> None:
    run = trained()
    for name in ("one.png", "two.png"):
        diff(f"{run}@4", f"{run}@12", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_beside_other_weights_is_refused(trained, tmp_path) -> None:
    from finetune.errors import FinetuneError

    adapter, full = trained(), trained("full", **FULL)
    with pytest.raises(FinetuneError, match="with its own base"):
        diff(f"{adapter}@12", f"{full}@12")
    with pytest.raises(FinetuneError, match="no such folder"):
        diff(f"{full}@4", f"{full}@12", tmp_path / "missing/weights.png")
