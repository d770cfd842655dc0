"""`train.reproducibility: elastic`: the same bits at every number of ranks, and a run that changes it on the way."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.store.run.records import StepFigures
from tests import forks

pytestmark = pytest.mark.slow

LORA = {"name": "lora", "rank": 2, "alpha": 4, "dropout": 0.1}
TRAIN = {"steps": 4, "batch_size": 13, "precision": "fp32", "micro_batch_tokens": 96, "reproducibility": "elastic"}


@pytest.fixture(scope="module")
def experts(tiny_base, tiny_tokenizer, tmp_path_factory) -> Path:
    """A model with so many experts that a micro-batch leaves some without a token, and their weights without a gradient."""
    changed = {"moe_intermediate_size": 8, "num_experts_per_tok": 1, "num_experts": 64, "head_dim": 8}
    config = AutoConfig.from_pretrained(tiny_base).to_dict() | {"tie_word_embeddings": False, **changed}
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("bases") / "experts"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": "qwen3_moe"}))
    model.save_pretrained(made)
    tiny_tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def write_recipe(recipe_file, tiny_base) -> Callable[..., Path]:
    def write(adapter: object = LORA, base: Path = tiny_base, packing: bool = True, **train: object) -> Path:
        return recipe_file(
            name="elastic",
            base={"checkpoint": str(base)},
            adapter=adapter,
            optimizer={"learning_rate": 0.01},
            task={"name": "chat", "max_length": 64, "packing": packing},
            train={**TRAIN, **train},
            checkpoint={"every": "2 steps", "keep": {"last": 9}},
        )

    return write


def result(run: Path) -> tuple[dict[str, bytes], list[StepFigures]]:
    """Every tensor of the last checkpoint, and the figures of every step."""
    files = {path.name: path.read_bytes() for path in Store(run).checkpoints()[-1].path.glob("*.safetensors")}
    steps = journal.steps(journal.read(run))
    return files, [{name: steps[step][name] for name in ("loss", "grad_norm")} for step in sorted(steps)]


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        (LORA, {}),
        (None, {}),
        ({"name": "frozen", "freeze": ["model.layers.0.*"]}, {}),
        (LORA, {"precision": "bf16"}),
        (None, {"precision": "bf16", "weights": "bf16"}),
    ],
    ids=["lora", "full", "frozen", "lora in bf16", "weights in bf16"],
)
def test_a_training_has_the_same_bits_on_one_two_and_four_ranks(adapter, train, write_recipe, workers, tmp_path):
    recipe, results = write_recipe(adapter, **train), []
    for ranks in (1, 2, 4):
        workers(ranks).train(recipe, tmp_path / str(ranks))
        results.append(result(tmp_path / str(ranks)))
    assert len(results[0][1]) == 4
    assert results[0] == results[1] == results[2]


def test_padded_rows_and_experts_without_tokens_have_the_same_bits_too(write_recipe, workers, experts, tmp_path):
    for name, recipe in (("padded", write_recipe(packing=False)), ("experts", write_recipe(None, experts))):
        for ranks in (1, 2, 4):
            workers(ranks).train(recipe, tmp_path / name / str(ranks))
        assert len({json.dumps(result(tmp_path / name / str(ranks))[1]) for ranks in (1, 2, 4)}) == 1
        first, second, third = (result(tmp_path / name / str(ranks))[0] for ranks in (1, 2, 4))
        assert first == second == third


def test_without_it_another_number_of_ranks_gives_other_bits(write_recipe, workers, tmp_path):
    recipe = write_recipe(reproducibility="exact")
    for ranks in (1, 2):
        workers(ranks).train(recipe, tmp_path / str(ranks))
    assert result(tmp_path / "1") != result(tmp_path / "2")


def test_a_run_goes_on_with_more_or_fewer_ranks_as_if_nothing_had_changed(write_recipe, workers, tmp_path):
    recipe, whole, moved = write_recipe(steps=8), tmp_path / "whole", tmp_path / "moved"
    workers(1).train(recipe, whole)
    assert workers(4).train(recipe, moved, killed_after=3) == "killed"
    for ranks, until in ((1, 4), (2, 5), (4, 8)):
        workers(ranks).train(recipe, moved, until=until)
    assert result(moved) == result(whole)
    assert [line for record in journal.read(moved) for line in record.get("changes", [])] == []


def test_a_run_of_several_ranks_is_replayed_in_one_process_to_the_bit(write_recipe, workers, tmp_path):
    run = tmp_path / "run"
    workers(2).train(write_recipe(), run)

    def replay(*words: str) -> dict[str, object]:
        command = [sys.executable, "-m", "finetune", "replay", str(run), "--steps", *words, "--json"]
        replayed = forks.run(command, capture_output=True, text=True, timeout=240)
        assert replayed.returncode == 0, replayed.stderr
        return json.loads(replayed.stdout)

    found = replay("2..4")
    assert (found["identical"], found["notes"]) == (True, [])
    # step 4 is gone, and comes back with its bytes
    files, _ = result(run)
    shutil.rmtree(Store(run).find(4).path)
    replay("4", "--materialize")
    assert Store(run).find(4).step == 4
    assert result(run)[0] == files
