"""Steps of a real run once more: equal to the bit, inspected, and made checkpoints."""

import json
import shutil

import pytest

from finetune.debug.bisect import bisect
from finetune.debug.reexecute import Rerun
from finetune.debug.replay import materialize, replay
from finetune.errors import CheckpointError, RunError
from finetune.store.checkpoints.pruning import prune
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.run import inspect, journal
from tests import forks
from tests.lengths import length
from tests.stories.same_run import assert_same_run

SPARSE = {"every": "8 steps", "keep": {"last": 9}}


@pytest.fixture
def run(recipe_file, train_once, tmp_path):
    return train_once(
        recipe_file(
            train={"steps": 20, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}, checkpoint=SPARSE
        ),
        tmp_path / "run",
    )


def digests(run, step):
    return {
        (name, tensor.name): tensor.digest
        for name, file in Store(run).find(step).manifest.files.items()
        for tensor in file.tensors
    }


@pytest.mark.slow
def test_every_step_comes_out_as_it_was_recorded(run) -> None:
    facts = replay(run, 1, 20)
    assert (facts["identical"], facts["first_difference"], facts["steps"]) == (True, None, [1, 20])


@pytest.mark.slow
def test_no_command_holds_the_whole_journal(run, monkeypatch) -> None:
    monkeypatch.setattr(journal, "read", lambda run: pytest.fail("all records of a run"))
    assert replay(run, 13, 13, is_materialized=True)["identical"]
    assert bisect(run, "loss > 0")["first_bad_step"] is None
    assert inspect.log(run)["steps"]["recorded"] == 20
    assert find(parse(f"{run}@best")).step == 20
    assert prune(run, {"last": 1}, is_dry_run=True).actions


@pytest.mark.slow
def test_a_step_between_checkpoints_is_reached_from_the_one_before(run, capfd) -> None:
    assert replay(run, 13, 14)["identical"]
    assert "running steps 9 to 12 again" in capfd.readouterr().err


@pytest.mark.slow
def test_a_figure_that_was_recorded_otherwise_is_the_first_difference(run) -> None:
    path = run / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step" and line["step"] == 11:
            line["grad_norm"] += 1e-9
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = replay(run, 1, 20)["first_difference"]
    assert (found["step"], found["quantity"]) == (11, "grad_norm")
    with pytest.raises(CheckpointError, match="step 11: grad_norm"):
        replay(run, 12, 12, is_materialized=True)
    assert [item.step for item in Store(run).checkpoints()] == [8, 16, 20]


@pytest.mark.slow
def test_a_checkpoint_whose_bytes_are_others_differs_though_the_record_agrees(
    run, recipe_file, train, tmp_path
) -> None:
    other = train(recipe_file("other", checkpoint=SPARSE), tmp_path / "other", "train.steps=16", "train.seed=1")
    shutil.rmtree(run / "checkpoints/step-00000016")
    shutil.copytree(other / "checkpoints/step-00000016", run / "checkpoints/step-00000016")
    found = replay(run, 10, 16)["first_difference"]
    assert found["step"] == 16 and found["quantity"].startswith("tensor weights/")


def test_inspection_shows_rows_tokens_and_modules_and_changes_nothing(run) -> None:
    facts = replay(run, 3, 3, is_inspected=True)
    assert facts["identical"]
    (step,) = facts["inspected"]
    assert len(step["rows"]) == 6 and step["first_not_finite_activation"] is None
    losses = [row["loss"] for row in step["rows"]]
    assert losses == sorted(losses, reverse=True)
    for row in step["rows"]:
        values = [loss for _, loss in row["token_losses"]]
        assert len(values) == row["supervised_tokens"]
        assert sum(values) / len(values) == pytest.approx(row["loss"], rel=1e-5)
        assert "⟦" in row["text"] and "assistant" in row["text"].partition("⟦")[0]
    whole = sum(norm**2 for norm in step["module_grad_norms"].values()) ** 0.5
    assert whole == pytest.approx(step["grad_norm"], rel=1e-5)
    assert list(step["module_grad_norms"]) == ["layers.0", "layers.1"]


@pytest.mark.slow
def test_a_materialized_step_is_the_checkpoint_that_a_save_would_have_made(run, recipe_file, train, tmp_path) -> None:
    every = train(
        recipe_file(
            "every",
            train={"steps": 20, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
            checkpoint={"every": "1 steps", "keep": {"last": 99}},
        ),
        tmp_path / "every",
    )
    facts = replay(run, 10, 12, is_materialized=True)
    assert facts["materialized"] == [f"{run}@10", f"{run}@11", f"{run}@12"]
    for step in (10, 11, 12):
        assert digests(run, step) == digests(every, step)
        for name in ("state.json", "adapter_config.json"):
            assert (run / f"checkpoints/step-{step:08d}/{name}").read_bytes() == (
                every / f"checkpoints/step-{step:08d}/{name}"
            ).read_bytes()
        history = [
            json.loads((each / f"checkpoints/step-{step:08d}/trainer_state.json").read_bytes()) for each in (run, every)
        ]
        assert history[0]["log_history"] == history[1]["log_history"]
    assert Store(run).find(10).manifest.parent["ref"] == "run@8"
    assert Store(run).pinned() == {10, 11, 12}


@pytest.mark.slow
def test_a_materialized_step_outlives_the_keep_rules_and_a_resume(recipe_file, train, tmp_path) -> None:
    recipe = recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 1}})
    run, whole = tmp_path / "run", train(recipe, tmp_path / "whole")
    from finetune.recipe.load import load
    from finetune.training.run import train as train_run

    train_run(load(recipe), run, is_quiet=True, until=7)
    replay(run, 5, 5, is_materialized=True)
    train_run(load(recipe), run, is_quiet=True)
    assert [item.step for item in Store(run).checkpoints()] == [5, 10]
    shutil.rmtree(run / "checkpoints/step-00000005")
    assert_same_run(run, whole)


def test_steps_that_a_run_does_not_have_are_refused(run) -> None:
    with pytest.raises(RunError, match="has 20 steps"):
        replay(run, 19, 21)


@pytest.mark.slow
def test_a_skipped_step_is_skipped_again(recipe_file, train, tmp_path, monkeypatch, tiny_tokenizer) -> None:
    import math

    from tests.stories.poison import poison, rows_with_marks

    poison(monkeypatch, tiny_tokenizer, math.nan)
    rows = rows_with_marks(tmp_path / "rows.jsonl", 240, 6, [5])
    recipe = recipe_file(
        task={"name": "text", "max_length": 64},
        data={"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        guard={"not_finite": "skip"},
    )
    run = train(recipe, tmp_path / "run")
    facts = replay(run, 3, 8, is_inspected=True)
    assert facts["identical"]
    step = facts["inspected"][2]
    assert (step["step"], step["rows"][0]["row"]) == (5, rows[5])
    assert journal.steps(journal.read(run))[5]["skipped"] == "not_finite"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_random_steps_of_a_run_are_what_a_run_that_saves_every_step_has(recipe_file, train, tmp_path) -> None:
    import random

    last, tried = length((120, 15), (500, 50))
    long = {"steps": last, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    data = {"train": yaml_of(recipe_file)["data"]["train"]}
    sparse = train(
        recipe_file(train=long, data=data, checkpoint={"every": "50 steps", "keep": {"last": 99}}), tmp_path / "run"
    )
    every = train(
        recipe_file("every", train=long, data=data, checkpoint={"every": "1 steps", "keep": {"last": 999}}),
        tmp_path / "every",
    )
    steps = sorted(random.Random(0).sample(range(1, last + 1), tried))
    materialize(Rerun(sparse), steps)
    for step in steps:
        assert digests(sparse, step) == digests(every, step), step


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_replays_whole(recipe_file, finetune, tmp_path) -> None:
    import signal
    import sys
    import time

    long = {"steps": 120, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    recipe, run = recipe_file(train=long, checkpoint={"every": "10 steps", "keep": {"last": 99}}), tmp_path / "run"
    for wanted in (25, 70):
        process = forks.Popen([sys.executable, "-m", "finetune", "train", recipe, "--run", run, "--quiet"])
        deadline = time.monotonic() + 100
        while max(journal.steps(journal.read(run)), default=0) < wanted:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert finetune("train", recipe, "--run", run, "--quiet").returncode == 0
    assert replay(run, 1, 120)["identical"]
    result = finetune("branch", f"{run}@33", "--run", tmp_path / "made", "--until", "40", "--quiet")
    assert result.returncode == 0, result.stderr
    assert Store(run).pinned() == {33}


def yaml_of(recipe_file) -> dict:
    import yaml

    return yaml.safe_load(recipe_file("other").read_text())
