"""What transformers' Trainer and peft wrote, and our own adapters, are bases like any other: planned, trained, resumed, packaged.

The checkpoints here are made by the real libraries. Hubs are on the loopback.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.modelcard import parse_log_history
from transformers.trainer_callback import TrainerState

from finetune.errors import BaseError, CheckpointError
from finetune.package import export
from finetune.recipe.load import load
from finetune.store.checkpoints.refs import find, parse
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import open_model
from finetune.training.resolve import resolve
from finetune.training.run import train as train_until
from tests.hub import Hub

TOKENS = torch.arange(10, 40)[None]
ADAPTER = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class Elsewhere(NamedTuple):
    path: Path
    """checkpoint-4 of a Trainer's output directory."""
    logits: torch.Tensor
    """Of the model that the Trainer had in memory."""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def elsewhere(tiny_base, tiny_tokenizer, tmp_path_factory):
    """A function that trains the tiny base for four steps with the real Trainer."""

    def elsewhere(name: str, adapter: peft.LoraConfig | None = None, has_tokenizer: bool = True) -> Elsewhere:
        output = tmp_path_factory.mktemp("elsewhere") / name
        rows = [
            {"input_ids": list(range(first, first + 16)), "labels": list(range(first, first + 16))}
            for first in range(40)
        ]
        settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
        with warnings.catch_warnings(action="ignore"):
            model = AutoModelForCausalLM.from_pretrained(tiny_base)
            trainer = Trainer(
                model=peft.get_peft_model(model, adapter) if adapter else model,
                args=TrainingArguments(str(output), **settings, disable_tqdm=True, logging_steps=1),
                train_dataset=rows,
                processing_class=tiny_tokenizer if has_tokenizer else None,
            )
            trainer.train()
        return Elsewhere(output / "checkpoint-4", logits(trainer.model.eval()))

    return elsewhere


@pytest.fixture(scope="module")
def full(elsewhere) -> Elsewhere:
    return elsewhere("full")


@pytest.fixture(scope="module")
def lora(elsewhere) -> Elsewhere:
    return elsewhere("lora", ADAPTER)


@pytest.mark.slow
def test_a_checkpoint_of_trainer_is_planned_trained_and_packaged_and_no_pickle_of_it_is_read(
    full, recipe_file, train, tmp_path
) -> None:
    theirs = shutil.copytree(full.path, tmp_path / "out/checkpoint-4")
    pickles = [theirs / name for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin")]
    for pickle in pickles:
        assert pickle.is_file()
        pickle.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    recipe = recipe_file(base={"checkpoint": str(theirs)}, adapter=None)
    pinned = resolve(load(recipe, ())).plan.base
    assert (pinned.kind, pinned.beneath) == ("directory", None)
    run = train(recipe, tmp_path / "run")
    same(logits(open_model(f"{run}@0").model), full.logits)
    facts = export.package(f"{run}@last", tmp_path / "package")
    assert {"checkpoint", "private"} <= {check["name"] for check in facts["checks"]}


@pytest.mark.slow
def test_a_checkpoint_of_trainer_without_a_tokenizer_says_what_is_missing_and_where(
    elsewhere, recipe_file, tiny_tokenizer
) -> None:
    theirs = elsewhere("without", has_tokenizer=False).path
    recipe = recipe_file(base={"checkpoint": str(theirs)})
    with pytest.raises(BaseError) as caught:
        resolve(load(recipe, ()))
    assert str(caught.value) == (
        "checkpoint-4: has no tokenizer\n"
        f"hint: copy tokenizer.json and tokenizer_config.json of the model that it was trained from into {theirs}"
    )
    tiny_tokenizer.save_pretrained(theirs)
    resolve(load(recipe, ()))


@pytest.mark.slow
def test_an_adapter_of_trainer_is_merged_trained_resumed_without_its_base_and_packaged(
    lora, recipe_file, train, tiny_base, tmp_path
) -> None:
    theirs = shutil.copytree(lora.path, tmp_path / "checkpoint-4")
    below = shutil.copytree(tiny_base, tmp_path / "below")
    config = json.loads((theirs / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(below)}))
    recipe = recipe_file(base={"checkpoint": str(theirs)})
    loaded = load(recipe, ())
    assert resolve(loaded).plan.base.kind == "adapter"
    run = tmp_path / "run"
    train_until(loaded, run, is_quiet=True, until=4)
    same(logits(open_model(f"{run}@0").model), lora.logits)
    shutil.rmtree(below)
    train(recipe, run)
    assert find(parse(f"{run}@last")).step == 10
    facts = export.package(f"{run}@last", tmp_path / "package")
    packaged = AutoModelForCausalLM.from_pretrained(facts["path"], dtype=torch.float32)
    same(logits(packaged), logits(open_model(f"{run}@last").model))


@pytest.mark.slow
def test_an_adapter_of_one_of_our_runs_is_a_base_and_the_next_one_on_it_too(recipe_file, train, tmp_path) -> None:
    first = train(recipe_file(), tmp_path / "first")
    directory = find(parse(f"{first}@8")).path
    second = train(recipe_file("second", base={"checkpoint": f"{first}@8"}), tmp_path / "second")
    plan, _ = RunDirectory(second).plan()
    assert plan.base.beneath == RunDirectory(first).plan()[0].base
    same(logits(open_model(f"{second}@0").model), logits(open_model(f"{first}@8").model))
    by_path = resolve(load(recipe_file("third", base={"checkpoint": str(directory)}), ())).plan
    assert by_path.base == plan.base
    third = train(recipe_file("third", base={"checkpoint": f"{second}@last"}), tmp_path / "third")
    same(logits(open_model(f"{third}@0").model), logits(open_model(f"{second}@last").model))


@pytest.mark.slow
def test_a_damaged_checkpoint_of_ours_is_no_base(recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(), tmp_path / "first")
    weights = find(parse(f"{run}@8")).path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="adapter_model.safetensors: tensor .* has other bytes than were committed"
    ):
        resolve(load(recipe_file("second", base={"checkpoint": f"{run}@8"}), ()))


@pytest.mark.slow
def test_the_hub_commit_beneath_an_adapter_is_pinned_and_holds_when_the_branch_moves(
    lora, recipe_file, finetune, tiny_base, tmp_path
) -> None:
    with Hub(seconds=280) as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        online = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "huggingface"), "HF_HUB_DISABLE_XET": "1"}
        online |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "FINETUNE_CACHE": str(tmp_path / "cache")}
        below = hub.add("model", "tiny/base")
        below.commit_directory(tiny_base)
        above = hub.add("model", "tiny/adapter")
        above.commit_directory(lora.path)
        config = json.loads((lora.path / "adapter_config.json").read_text())
        above.commit({"adapter_config.json": json.dumps(config | {"base_model_name_or_path": "tiny/base"}).encode()})
        recipe = recipe_file(base={"checkpoint": "tiny/adapter"})
        trained = finetune("train", recipe, "--run", tmp_path / "run", env=online)
        assert "merging tiny/adapter onto tiny/base, once" in trained.stderr and trained.returncode == 0, trained.stderr
        pinned = RunDirectory(tmp_path / "run").plan()[0].base
        assert (pinned.kind, pinned.revision) == ("adapter", above.branches["main"])
        assert (pinned.beneath.kind, pinned.beneath.revision) == ("hub", below.branches["main"])
        below.commit({"config.json": b"of another model"})
        shutil.rmtree(tmp_path / "cache")
        resumed = finetune("train", recipe, "--run", tmp_path / "run", env=online)
        assert "finished at step 10" in resumed.stderr and resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_tools_that_read_runs_of_trainer_read_ours(recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(evaluate={"every": "4 steps"}), tmp_path / "run")
    state = TrainerState.load_from_json(str(find(parse(f"{run}@last")).path / "trainer_state.json"))
    assert (state.global_step, state.max_steps) == (10, 10)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert len(losses) == 10 and all(entry["step"] <= 10 for entry in state.log_history)
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    assert list(evaluated) == [0, 4, 8, 10]
    assert parse_log_history(state.log_history)[2]["eval_loss"] == evaluated[10]
    assert (state.best_metric, evaluated[state.best_global_step]) == (min(evaluated.values()),) * 2
