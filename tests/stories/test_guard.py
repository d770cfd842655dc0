"""What a guard does to a real training: updates that are skipped, runs that go back, and what is kept of them."""

import json
import math
import shutil
import sys

import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import NotFiniteError
from finetune.recipe.load import load
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.training import incident
from finetune.training.respond import SpikeError
from tests import forks
from tests.stories.poison import poison, rows_with_marks
from tests.stories.same_run import assert_same_run

ROWS, BATCH = 480, 6


def events(run, name):
    return [record for record in journal.read(run) if record.get("event") == name]


@pytest.fixture
def poisoned(recipe_file, tmp_path, monkeypatch, tiny_tokenizer):
    """A function that writes a recipe of 60 steps, in some of which a row has the mark; returns it and the rows by step."""

    def poisoned(value, steps, total=60, **sections):
        poison(monkeypatch, tiny_tokenizer, value)
        rows = rows_with_marks(tmp_path / "rows.jsonl", ROWS, BATCH, steps)
        train = {"steps": total, "batch_size": BATCH, "precision": "fp32", "micro_batch_tokens": 256}
        parts = {
            "task": {"name": "text", "max_length": 64},
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
            "train": train,
            "checkpoint": {"every": "10 steps", "keep": {"last": 9}},
            "optimizer": {"learning_rate": 1e-3},
        }
        return recipe_file(**parts | sections), rows

    return poisoned


def test_a_loss_that_is_no_number_ends_the_run_with_the_state_before_and_a_bundle(poisoned, train, tmp_path) -> None:
    recipe, rows = poisoned(math.nan, [13])
    with pytest.raises(NotFiniteError) as caught:
        train(recipe, tmp_path / "run")
    said, hint = str(caught.value).split("\n")
    assert said.startswith("step 13: loss nan and gradient norm nan are not finite")
    assert said.endswith(f"rows [{rows[13]}]")
    assert hint.endswith(f"`finetune replay {tmp_path / 'run'} --steps 13 --inspect`")
    assert Store(tmp_path / "run").checkpoints()[-1].step == 12
    (event,) = events(tmp_path / "run", "not_finite")
    assert (event["step"], event["loss"], event["quantity"]) == (13, "nan", "loss")
    report = json.loads((tmp_path / "run/debug/step-00000013/report.json").read_bytes())
    assert report["figures"]["loss"] == "nan" and report["reason"] == "not_finite"
    first = json.loads((tmp_path / "run/debug/step-00000013/rows.jsonl").read_text().splitlines()[0])
    assert first["row"] == rows[13] and first["loss"] == "nan" and "~" in first["text"]


@pytest.mark.slow
def test_a_step_that_is_skipped_keeps_its_number_and_moves_nothing(poisoned, train, tmp_path) -> None:
    recipe, _ = poisoned(math.nan, [13, 25], total=30, guard={"not_finite": "skip"})
    run = train(recipe, tmp_path / "run")
    records = journal.steps(journal.read(run))
    assert list(records) == list(range(1, 31))
    assert [step for step, record in records.items() if "skipped" in record] == [13, 25]
    assert records[13]["loss"] == "nan" and records[13]["skipped"] == "not_finite"
    newest = Store(run).find(30).manifest
    assert [(each["first"], each["last"], each["action"]) for each in newest.amendments] == [
        (13, 13, "skip"),
        (25, 25, "skip"),
    ]
    assert [each["step"] for each in Store(run).find(20).manifest.amendments] == [13]
    state = json.loads((run / "checkpoints/step-00000030/state.json").read_bytes())
    assert set(state["scalars"].values()) == {28}  # the optimizer's own counters have the updates that were made
    history = json.loads((run / "checkpoints/step-00000030/trainer_state.json").read_bytes())["log_history"]
    assert 13 not in [entry["step"] for entry in history] and 14 in [entry["step"] for entry in history]


@pytest.mark.slow
def test_a_run_with_skips_that_stops_and_goes_on_is_the_same_run(poisoned, tmp_path) -> None:
    from finetune.training.run import train as train_run

    recipe, _ = poisoned(math.nan, [13, 25], total=30, guard={"not_finite": "skip"})
    train_run(load(recipe), tmp_path / "whole", is_quiet=True)
    for until in (12, 13, 20, None):
        train_run(load(recipe), tmp_path / "parts", is_quiet=True, until=until)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_skips_are_bounded(poisoned, train, tmp_path) -> None:
    recipe, _ = poisoned(math.nan, [13, 25, 31], guard={"not_finite": "skip", "limit": 2})
    with pytest.raises(NotFiniteError, match="not finite"):
        train(recipe, tmp_path / "run")
    assert Store(tmp_path / "run").checkpoints()[-1].step == 30
    assert "guard.limit" in events(tmp_path / "run", "not_finite")[0]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_a_spike_is_told_left_out_or_ends_the_run(action, poisoned, train, tmp_path) -> None:
    recipe, rows = poisoned(30.0, [45], total=46, guard={"spike": action})
    run = tmp_path / "run"
    if action == "stop":
        with pytest.raises(SpikeError, match=f"row {rows[45]} has the highest loss"):
            train(recipe, run)
        assert Store(run).checkpoints()[-1].step == 44
        assert events(run, "spike")[0]["step"] == 45
        return
    train(recipe, run)
    record = journal.steps(journal.read(run))[45]
    assert record.get("skipped") == ("spike" if action == "skip" else None)
    assert [event["step"] for event in events(run, "spike" if action == "warn" else "amended")] == [45]
    assert (run / "debug/step-00000045").exists() == (action == "skip")


@pytest.mark.slow
def test_a_rollback_goes_on_from_the_checkpoint_before_and_leaves_the_span_out(
    poisoned, train, tmp_path, capfd
) -> None:
    recipe, _ = poisoned(30.0, [45], total=50, guard={"spike": "rollback", "span": 7})
    run = train(recipe, tmp_path / "run")
    (event,) = events(run, "amended")
    assert (event["first"], event["last"], event["to"], event["action"]) == (39, 45, 30, "rollback")
    assert "back to step 30, steps 39 to 45 skipped" in capfd.readouterr().err
    records = journal.read(run)
    counted = journal.steps(records)
    assert [step for step, record in counted.items() if "skipped" in record] == list(range(39, 46))
    again = [record["step"] for record in records if record["kind"] == "step"]
    assert again == [*range(1, 45), *range(31, 51)]
    assert [item.step for item in Store(run).checkpoints()] == [10, 20, 30, 40, 50]
    # the state after the span is the one before it
    digests = [
        {t.name: t.digest for t in Store(run).find(step).manifest.files["adapter_model.safetensors"].tensors}
        for step in (30, 40)
    ]
    assert digests[0] != digests[1]
    assert not events(run, "not_exact")


@pytest.mark.slow
def test_a_rolled_back_run_that_is_cut_and_resumed_is_the_same_run(poisoned, tmp_path) -> None:
    from finetune.training.run import train as train_run

    recipe, _ = poisoned(30.0, [45], total=54, guard={"spike": "rollback", "span": 7})
    train_run(load(recipe), tmp_path / "whole", is_quiet=True)
    for until in (44, 52, None):
        train_run(load(recipe), tmp_path / "parts", is_quiet=True, until=until)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_rollback_with_no_checkpoint_before_it_stops(poisoned, train, tmp_path) -> None:
    recipe, _ = poisoned(30.0, [45], guard={"spike": "rollback"}, checkpoint={"every": "1000 steps"})
    with pytest.raises(SpikeError):
        train(recipe, tmp_path / "run")
    assert Store(tmp_path / "run").checkpoints()[-1].step == 44


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "guard", "strategy"),
    [
        ("nan", {"not_finite": "skip"}, "ddp"),
        ("30", {"spike": "rollback", "span": 7}, "ddp"),
        ("30", {"spike": "rollback", "span": 7}, "fsdp"),  # whose ranks verify the checkpoint together
    ],
)
def test_two_processes_decide_alike(value, guard, strategy, poisoned, train, tmp_path, tiny_base, monkeypatch) -> None:
    recipe, _ = poisoned(float(value), [45], guard=guard)
    one = train(recipe, tmp_path / "one")
    monkeypatch.setenv("POISON_BASE", str(tiny_base))
    monkeypatch.setenv("POISON", value)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [*launcher, "tests.stories.poison", "train", recipe, "--run", tmp_path / "two", "--quiet"]
    command += ["--set", f"train.strategy={strategy}"]
    result = forks.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (first,), (second,) = (events(run, "amended") for run in (one, tmp_path / "two"))
    names = ("first", "last", "action", "step")
    assert [first[name] for name in names] == [second[name] for name in names]
    steps = [list(journal.steps(journal.read(run))) for run in (one, tmp_path / "two")]
    assert steps[0] == steps[1] == list(range(1, 61))


@pytest.mark.slow
def test_a_rollback_does_not_take_what_is_pinned(poisoned, tmp_path) -> None:
    from finetune.debug.replay import replay
    from finetune.training.run import train as train_run

    recipe, _ = poisoned(30.0, [45], guard={"spike": "rollback", "span": 7})
    run = tmp_path / "run"
    train_run(load(recipe), run, is_quiet=True, until=42)
    replay(run, 40, 40, is_materialized=True)
    with pytest.raises(SpikeError):
        train_run(load(recipe), run, is_quiet=True)
    assert 40 in [item.step for item in Store(run).checkpoints()]


def test_a_bundle_that_cannot_be_written_does_not_change_what_was_decided(
    poisoned, train, tmp_path, monkeypatch, capfd
) -> None:
    from finetune.errors import RunError

    def full(*_: object) -> None:
        raise RunError("no space left on the device")

    monkeypatch.setattr(incident, "write", full)
    recipe, _ = poisoned(math.nan, [13], total=14, guard={"not_finite": "skip"})
    run = train(recipe, tmp_path / "run")
    assert journal.steps(journal.read(run))[13]["skipped"] == "not_finite"
    assert "no bundle of step 13: no space left" in capfd.readouterr().err


@pytest.mark.parametrize("holdout", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_base_with_nan_is_named_and_no_row(
    holdout, action, recipe_file, tiny_sections, tiny_base, train, tmp_path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    data = tiny_sections["data"] if holdout else {"train": tiny_sections["data"]["train"]}
    recipe = recipe_file(base={"checkpoint": str(base)}, data=data, guard={"not_finite": action})
    with pytest.raises(NotFiniteError) as caught:
        train(recipe, tmp_path / "run")
    assert caught.value.message == (
        "the base is broken: its tensor model.layers.1.mlp.up_proj.weight has NaN or infinite values"
    )
    assert "no row is to blame" in caught.value.hint and "rows" not in str(caught.value)
    assert not (tmp_path / "run/debug").exists()
