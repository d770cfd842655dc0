"""Stopped anywhere and started again with the same command, a run ends as if it had never stopped: bit for bit."""

import json
import time
from pathlib import Path

import pytest

from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Killed, killed


@pytest.mark.slow
def test_bf16_runs_resume_exactly_too(recipe_file, train, tmp_path) -> None:
    recipe = recipe_file(train={"steps": 10, "batch_size": 6, "micro_batch_tokens": 128})
    whole = train(recipe, tmp_path / "whole")
    with killed(after=6), pytest.raises(Killed):
        train(recipe, tmp_path / "killed")
    train(recipe, tmp_path / "killed")
    assert_same_run(whole, tmp_path / "killed")


@pytest.mark.slow
def test_evaluating_and_saving_leave_no_trace_in_training(recipe_file, train, tmp_path) -> None:
    often = train(
        recipe_file(evaluate={"every": "1 step"}, checkpoint={"every": "1 step", "keep": {"last": 20}}),
        tmp_path / "often",
    )
    seldom = train(recipe_file(checkpoint={"every": "10 steps"}), tmp_path / "seldom")
    assert_same_steps(often, seldom)


def assert_same_steps(run: Path, other: Path) -> None:
    steps, others = journal.steps(journal.read(run)), journal.steps(journal.read(other))
    assert [journal.difference(steps[step], others[step]) for step in steps] == [None] * len(others)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_steps_not_the_run(recipe_file, train, tmp_path, capsys) -> None:
    recipe = recipe_file(checkpoint={"every": "3 steps", "keep": {"last": 3}})
    whole = train(recipe, tmp_path / "whole")
    damaged = train(recipe, tmp_path / "damaged")
    file = damaged / "checkpoints/step-00000010/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    capsys.readouterr()
    train(recipe, damaged)
    said = capsys.readouterr().err
    assert "damaged: step-00000010/adapter_model.safetensors: tensor base_model.model." in said
    assert "falling back to step 9: re-running 1 step\nresumed from step 9\n" in said
    assert_same_run(whole, damaged)
    assert not [record for record in journal.read(damaged) if record.get("event") == "not_exact"]


@pytest.mark.slow
def test_a_step_that_changes_when_run_again_is_reported_at_once(recipe_file, train, tmp_path, capsys) -> None:
    recipe = recipe_file(checkpoint={"every": "3 steps"})
    with killed(after=5), pytest.raises(Killed):
        train(recipe, tmp_path / "run")
    path = tmp_path / "run/journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(line.replace('"loss": ', '"loss": 1') if '"step": 5' in line else line for line in lines) + "\n"
    )
    train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    assert "step 5 ran before and is not the same: loss was 1" in said
    assert [record["step"] for record in journal.read(tmp_path / "run") if record.get("event") == "not_exact"] == [5]


@pytest.mark.slow
def test_retention_counts_on_sound_checkpoints_only(recipe_file, train, tmp_path) -> None:
    recipe = recipe_file(checkpoint={"every": "1 step", "keep": {"last": 1}})
    run = train(recipe, tmp_path / "run", "checkpoint.keep.last=3")
    for step in (9, 10):
        file = run / f"checkpoints/step-{step:08d}/adapter_model.safetensors"
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with killed(after=9), pytest.raises(Killed):
        train(recipe, run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[0] == "step-00000008"
    train(recipe, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]
    assert not verify(run / "checkpoints/step-00000010")


@pytest.mark.slow
def test_small_files_are_linked_from_checkpoint_to_checkpoint(recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 3}}), tmp_path / "run")
    tokenizers = [path / "tokenizer.json" for path in (run / "checkpoints").iterdir()]
    assert len({path.stat().st_ino for path in tokenizers}) == 1
    assert tokenizers[0].stat().st_nlink == 3


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_of_another_run(recipe_file, train, tmp_path) -> None:
    first = train(recipe_file(adapter=None), tmp_path / "first")
    second = train(recipe_file("second", base={"checkpoint": f"{first}@last"}), tmp_path / "second")
    loss = journal.steps(journal.read(first))[10]["loss"]
    assert journal.steps(journal.read(second))[1]["loss"] < loss
    assert (
        json.loads((second / "checkpoints/step-00000010/adapter_config.json").read_bytes())["base_model_name_or_path"]
        == "first@last"
    )


@pytest.mark.slow
def test_an_update_waits_for_the_copy_of_the_state_before_it(recipe_file, train, tmp_path, monkeypatch) -> None:
    """A copy that is slower than a step: without the wait, checkpoints would hold a mixture of two steps."""
    from finetune.training.saving.buffers import Copy

    fill = Copy._fill

    def slowly(self: Copy, *arguments: object) -> None:
        time.sleep(0.2)
        fill(self, *arguments)

    recipe = recipe_file(checkpoint={"every": "1 step", "keep": {"last": 20}})
    quick = train(recipe, tmp_path / "quick")
    monkeypatch.setattr(Copy, "_fill", slowly)
    slow = train(recipe, tmp_path / "slow")
    for checkpoint in sorted((quick / "checkpoints").iterdir()):
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert (checkpoint / name).read_bytes() == (slow / "checkpoints" / checkpoint.name / name).read_bytes()
    assert max(record["await_seconds"] for record in journal.steps(journal.read(slow)).values()) > 0.05


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_ends_the_run_with_its_error(
    recipe_file, train, tmp_path, monkeypatch
) -> None:
    from finetune.errors import CheckpointError
    from finetune.store.checkpoints.store import Store

    def refuse(self: Store, attempt: object, *_: object, **__: object) -> None:
        raise CheckpointError("the disk said no", where=str(attempt.path))

    recipe = recipe_file(checkpoint={"every": "3 steps"})
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", refuse)
        with pytest.raises(CheckpointError, match="the disk said no"):
            train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run")
    assert_same_run(train(recipe, tmp_path / "whole"), tmp_path / "run")
