"""A package is the model that was trained, or it is not there. Each package here was loaded back by another process."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from finetune.errors import PackageError
from finetune.package import bounds, export, proof, refusals, weights
from finetune.package.attest import licence
from finetune.recipe.load import load
from finetune.recipe.schema import Base
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import open_model
from tests.package.conftest import PLANTED


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(60).reshape(2, 30), use_cache=False).logits


def test_a_merged_adapter_is_the_trained_model(merged) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged.directory)
    assert model.dtype == torch.float32
    assert torch.allclose(logits(model), logits(open_model(f"{merged.run}@best").model), atol=1e-4)
    assert merged.check("merge")["mean_kl"] <= merged.check("merge")["bound"] == bounds.MERGE_BOUND
    assert merged.check("logits")["max_difference"] == 0.0
    assert "cast" not in [check["name"] for check in merged.facts["checks"]]


def test_a_full_fine_tune_is_cast_once_and_equal_to_the_bit(full) -> None:
    whole = open_model(f"{full.run}@6").model.state_dict()
    model, info = AutoModelForCausalLM.from_pretrained(full.directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in model.state_dict().items())
    assert json.loads((full.directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < full.check("cast")["mean_kl"] < full.check("cast")["bound"]


def test_weights_over_the_limit_are_divided_and_tied_ones_stored_once(full) -> None:
    index = json.loads((full.directory / "model.safetensors.index.json").read_text())
    shards = {file.name for file in full.directory.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards and len(shards) > 1
    assert "lm_head.weight" not in index["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(full.directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_an_adapter_alone_names_its_base_on_the_hub(alone, tiny_base) -> None:
    from peft import PeftModel

    config = json.loads((alone.directory / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", None)
    assert not list(alone.directory.glob("model*")) and not (alone.directory / "config.json").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), alone.directory).eval()
    assert torch.equal(logits(model), logits(open_model(f"{alone.run}@6").model))


def test_a_package_answers_in_a_pipeline(merged) -> None:
    generate = pipeline("text-generation", model=str(merged.directory))
    (answer,) = generate([{"role": "user", "content": "the model"}], max_new_tokens=4)
    assert answer["generated_text"][-1]["role"] == "assistant"


def test_config_and_small_files_are_those_of_the_base(merged, tiny_base) -> None:
    config = json.loads((merged.directory / "config.json").read_text())
    assert config == json.loads((tiny_base / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged.directory / name).read_bytes() == (tiny_base / name).read_bytes()


def test_the_chat_template_of_the_recipe_is_packaged(full) -> None:
    assert AutoTokenizer.from_pretrained(full.directory).chat_template.startswith("{# own #}")


def test_every_file_is_listed_with_its_digest_and_can_be_read_by_others(merged) -> None:
    files = {str(file.relative_to(merged.directory)) for file in merged.directory.rglob("*") if file.is_file()}
    assert files == {file["name"] for file in merged.facts["files"]}
    for file in merged.facts["files"]:
        content = (merged.directory / file["name"]).read_bytes()
        assert (file["bytes"], file["digest"]) == (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
    modes = {file.stat().st_mode & 0o777 for file in merged.directory.rglob("*") if file.is_file()}
    assert modes == {merged.directory.stat().st_mode & 0o666}


def test_the_packaged_recipe_is_the_one_in_force_without_folders(merged, chat_data) -> None:
    text = (merged.directory / "training/recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["data"]["train"] == [{"path": "train.jsonl"}]
    assert recipe["base"] == {"checkpoint": "base"}
    assert (
        load(merged.directory / "training/recipe.yaml").recipe.optimizer
        == RunDirectory(merged.run).plan()[0].recipe.optimizer
    )


def test_the_packaged_journal_holds_figures_up_to_the_step(merged) -> None:
    step = max(item["step"] for item in map(json.loads, (merged.directory / "training/journal.jsonl").open()))
    assert f"step {step}" in (merged.directory / "README.md").read_text()
    for item in map(json.loads, (merged.directory / "training/journal.jsonl").open()):
        assert all(isinstance(value, int | float) for key, value in item.items() if key not in ("kind", "event"))
        assert not {"time", "attempt", "world"} & item.keys()


def test_nothing_private_is_in_a_package(merged, full, alone, tiny_base, chat_data) -> None:
    row = json.loads((chat_data / "train.jsonl").read_text().splitlines()[3])["messages"][0]["content"]
    for one in (merged, full, alone):
        private = [PLANTED, str(one.run.parent), str(tiny_base.parent), str(chat_data), row]
        for file in one.directory.rglob("*"):
            content = file.read_bytes() if file.is_file() and file.name != "tokenizer.json" else b""
            assert not [name for name in private if name.encode() in content], file


def test_a_folder_of_this_machine_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/somebody/models/tiny"}))
    refusals.refuse_private(tmp_path, [Path("/elsewhere/models/tiny")])
    with pytest.raises(PackageError, match="private: tokenizer_config.json names /home/somebody/models"):
        refusals.refuse_private(tmp_path, [Path("/home/somebody/models/tiny")])


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(merged) -> None:
    again = export.package(f"{merged.run}@best", merged.run.parent / "dist" / "again")
    assert again["files"] == merged.facts["files"]


def test_a_changed_weight_is_caught_by_name_and_leaves_no_folder(merged, tmp_path, monkeypatch) -> None:
    honest = weights.write

    def tampered(model, opened, form, dtype, directory) -> None:
        honest(model, opened, form, dtype, directory)
        file = directory / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(weights, "write", tampered)
    with pytest.raises(PackageError, match="weights: 1 of 21 are not as trained: model.norm.weight") as caught:
        export.package(f"{merged.run}@best", tmp_path / "dist")
    assert caught.value.hint.endswith("nothing was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_package_leaves_no_folder(end, merged, tmp_path, monkeypatch) -> None:
    def interrupted(directory: Path, base: Path | None) -> None:
        assert (directory / "model.safetensors").exists()
        raise end

    monkeypatch.setattr(proof, "load_back", interrupted)
    with pytest.raises(end):
        export.package(f"{merged.run}@best", tmp_path / "dist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_package_is_loaded_by_a_new_interpreter(alone, tiny_base, monkeypatch) -> None:
    """Elsewhere in these tests the process that loads is a fork of one that has imported more than it needs."""
    forked = proof.load_back(alone.directory, tiny_base)
    monkeypatch.setattr(proof, "subprocess", subprocess)
    new = proof.load_back(alone.directory, tiny_base)
    assert new.facts == forked.facts
    assert all(torch.equal(new.logits[name], forked.logits[name]) for name in new.logits)


def test_a_package_that_cannot_be_loaded_says_why(tmp_path) -> None:
    with pytest.raises(PackageError, match="load: cannot be loaded in a fresh process: .*config.json"):
        proof.load_back(tmp_path, None)


def test_an_existing_target_is_refused(merged) -> None:
    with pytest.raises(PackageError, match="is there already"):
        export.package(f"{merged.run}@best", merged.directory)


def test_only_a_checkpoint_of_a_run_can_be_packaged(merged, tiny_base, tmp_path) -> None:
    for ref in (f"{merged.run}@0", str(tiny_base), "owner/name"):
        with pytest.raises(PackageError, match="not a checkpoint of a run") as caught:
            export.package(ref, tmp_path / "dist")
        assert caught.value.where == ref
    assert list(tmp_path.iterdir()) == []


def test_too_large_a_change_is_refused() -> None:
    reference = {"batch": torch.zeros(1, 2, 5)}
    changed = {"batch": torch.tensor([[[0.0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]])}
    with pytest.raises(PackageError, match="cast: the cast changes the model by a mean KL of 0.0"):
        bounds.within("cast", "the cast", reference, changed, bounds.CAST_BOUND)
    nan = {"batch": torch.full((1, 2, 5), torch.nan)}
    with pytest.raises(PackageError, match="mean KL of nan"):
        bounds.within("cast", "the cast", reference, nan, bounds.CAST_BOUND)


def test_the_licence_is_read_from_the_card_of_the_base(tmp_path) -> None:
    base = Base(checkpoint=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert licence.of_base(base, tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\n# Base\n")
    assert licence.of_base(base, tmp_path) == {"license": "other", "license_name": "mine"}
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert licence.of_base(base, tmp_path) is None


def test_the_licence_of_a_base_in_a_python_package_is_read_from_its_gguf_file(tmp_path, monkeypatch) -> None:
    from gguf import GGUFWriter

    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier-1.0.dist-info").mkdir()
    (tmp_path / "carrier-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (tmp_path / "carrier-1.0.dist-info/top_level.txt").write_text("carrier\n")
    writer = GGUFWriter(tmp_path / "carrier/tiny.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.syspath_prepend(tmp_path)
    assert licence.of_base(Base(checkpoint="package:carrier/tiny.gguf"), None) == {"license": "apache-2.0"}


@pytest.mark.slow
def test_a_template_edited_after_training_is_packaged_as_it_was_trained_with(
    recipe_file, train, tiny_tokenizer, tmp_path
):
    template = tmp_path / "template.jinja"
    template.write_text(tiny_tokenizer.chat_template)
    run = train(recipe_file(task={"name": "chat", "max_length": 64, "template": str(template)}), tmp_path / "run")
    template.write_text(tiny_tokenizer.chat_template.replace("assistant", "bot"))
    export.package(f"{run}@last", tmp_path / "package")
    assert AutoTokenizer.from_pretrained(tmp_path / "package").chat_template == tiny_tokenizer.chat_template
