"""A run trained with fused kernels, and what its user does with it afterwards on a machine without them."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from finetune.compare.evaluate import evaluate
from finetune.debug.replay import replay
from finetune.errors import FinetuneError, RunError
from finetune.model.fused import liger
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.training.resume import open_plan
from finetune.training.strategy.start import start_accelerator
from tests import interpreted
from tests.conftest import copied
from tests.stories.same_run import assert_same_run

FUSED = {"steps": 2, "batch_size": 1, "precision": "bf16", "micro_batch_tokens": 64, "kernels": "fused"}
RANK = """
import sys
from pathlib import Path
from tests import interpreted
interpreted.prepare()
from finetune.recipe.load import load
from finetune.training.run import train
train(load(Path(sys.argv[1])), Path(sys.argv[2]), is_quiet=True)
"""
OFTEN = {"every": "1 steps", "keep": {"last": 9}}

pytestmark = pytest.mark.slow


@pytest.fixture
def kernels():
    """Real ones, run by Triton's interpreter."""
    interpreted.prepare()


@pytest.mark.parametrize(("method", "is_packed"), [("lora", True), ("full", False)], ids=["lora-packed", "full-padded"])
def test_a_run_with_fused_kernels_resumes_and_replays_to_the_bit(
    kernels, recipe_file, train, tiny_sections, tmp_path, method, is_packed
):
    sections = {"task": {**tiny_sections["task"], "packing": is_packed}, "train": FUSED, "checkpoint": OFTEN}
    recipe = recipe_file(**sections, **({} if method == "lora" else {"adapter": None}))
    whole = train(recipe, tmp_path / "whole")
    again = copied(whole, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/step-00000002")
    train(recipe, again)
    assert_same_run(again, whole)
    assert json.loads((whole / "plan.json").read_text())["facts"]["kernels"] == liger.versions()
    found = replay(whole, 1, 1)
    assert (found["identical"], found["notes"]) == (True, [])
    plain = train(recipe, tmp_path / "plain", "train.kernels=plain")
    losses = [[record["loss"] for record in journal.read(run) if "loss" in record] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]


def test_without_the_kernels_a_run_is_evaluated_and_goes_on_and_its_replay_is_refused_with_the_reason(
    kernels, recipe_file, train, tmp_path, monkeypatch
):
    recipe, run = recipe_file(train=FUSED, checkpoint=OFTEN), tmp_path / "run"
    train(recipe, run)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert evaluate([f"{run}@2"])[0]["metrics"]["loss"] > 0
    message = "step 1: was trained with liger-kernel .*, and plain kernels round otherwise; fused ones cannot run here: this machine has no CUDA device"
    with pytest.raises(RunError, match=message):
        replay(run, 1, 2)
    with pytest.raises(FinetuneError, match="train.kernels: `fused` kernels cannot run: this machine has no CUDA"):
        train(recipe, run, "train.steps=3")
    opened = open_plan(load(recipe, ["train.kernels=auto"]), run, start_accelerator(load(recipe).recipe.train))
    told = f"kernels changed: {liger.versions()} -> plain; bit equality may be lost"
    assert opened.changes == ["taken from the recipe: train.kernels: fused -> auto", told]
    train(recipe, run, "train.kernels=plain", "train.steps=3")
    assert (run / "checkpoints/step-00000003").is_dir()


def test_ranks_that_share_the_rows_of_weights_take_the_step_of_one(kernels, recipe_file, train, tmp_path):
    settings = FUSED | {"steps": 1, "batch_size": 4, "precision": "fp32"}
    alone = train(recipe_file(train=settings, adapter=None), tmp_path / "alone")
    spread = tmp_path / "spread"
    recipe, place = recipe_file(train={**settings, "strategy": "fsdp"}, adapter=None), {"WORLD_SIZE": "2"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "LOCAL_WORLD_SIZE": "2"}
    # Forks of our server would have an interpreter without what `prepare` adds.
    command = [sys.executable, "-c", RANK, str(recipe), str(spread)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    one, two = (journal.steps(journal.read(run))[1] for run in (alone, spread))
    assert (two["loss"], two["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-5)
    assert json.loads((spread / "plan.json").read_text())["facts"]["kernels"] == liger.versions()
