"""Compiled layers under `exact`: a run that stops and goes on in a process that compiles again ends with the same bits."""

import json
import shutil

import pytest
import torch

from finetune.debug.replay import replay
from finetune.errors import FinetuneError
from finetune.model import decoder_layers
from finetune.store.run import journal
from tests.conftest import copied
from tests.stories.same_run import assert_same_run


@pytest.mark.slow
def test_a_compiled_run_resumes_and_replays_to_the_bit(recipe_file, train, tiny_sections, tmp_path, monkeypatch):
    try:
        decoder_layers.check_compiler()
    except FinetuneError as error:
        pytest.skip(error.message)
    for name in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"):
        monkeypatch.setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name))  # put back afterwards
    # Every length is compiled once for itself, which takes seconds: few rows, and none held out.
    sections = {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128, "compile": True}
    rows = {"train": tiny_sections["data"]["train"]}
    recipe = recipe_file(train=sections, data=rows, checkpoint={"every": "1 steps", "keep": {"last": 9}})
    whole = train(recipe, tmp_path / "whole")
    again = copied(whole, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/step-00000002")
    torch._dynamo.reset()  # as a new process, it has compiled nothing
    train(recipe, again)
    assert_same_run(again, whole)
    assert replay(whole, 2, 2)["identical"]
    assert json.loads((whole / "plan.json").read_text())["facts"]["kernels"] == "compiled"
    plain = train(recipe, tmp_path / "plain", "train.compile=false")
    losses = [[record["loss"] for record in journal.read(run) if "loss" in record] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # other dropout: a filled-up sequence draws other masks
