"""What a resumed run knows of its first steps, without reading the journal of them."""

import json
from pathlib import Path

import pytest

from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training import guard
from finetune.training.so_far import Past


@pytest.fixture
def run(recipe_file, train_once, tmp_path: Path) -> Path:
    """Twelve steps, with commits at steps 4, 8 and 12 and evaluations at each of them."""
    kept = {"every": "4 steps", "keep": {"last": 3, "best": 1}}
    return train_once(recipe_file(checkpoint=kept), tmp_path / "run", "train.steps=12")


def past(run: Path, step: int) -> dict:
    """All that is known, the plan aside."""
    known = vars(Past(run, RunDirectory(run).plan()[0], Store(run).find(step)))
    return {name: value for name, value in known.items() if name != "_plan"}


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_checkpoint_and_the_end_of_the_journal_say_what_the_whole_journal_says(run, step, monkeypatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 2)
    known = past(run, step)
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines()
    first = next(place for place, line in enumerate(lines) if f'"kind": "step", "step": {step - 2}' in line)
    path.write_text("\n".join(lines[first:]) + "\n")
    shortened = past(run, step)
    monkeypatch.setattr("finetune.training.so_far._state_of", lambda checkpoint: None)
    path.write_text("\n".join(lines) + "\n")
    whole = past(run, step)
    assert whole.pop("evaluated").items() >= known["evaluated"].items()
    assert known.items() >= whole.items()
    assert known == shortened
    assert known["_tokens"] and len(known["evaluated"]) == 4


def test_steps_that_an_attempt_lost_are_remembered_beyond_the_commits_of_the_next(run, monkeypatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 2)
    records = journal.read(run)
    lost = [record for record in records if record["kind"] == "step" and record["step"] in (9, 10)]
    early = [record for record in records if record.get("step", 0) <= 8]
    for record in early:
        if record.get("event") == "committed" and record["step"] == 8:
            record["newest_step"] = 10  # the lost attempt had come so far
    path = run / "journal.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in [*lost, *early]))
    known = Past(run, RunDirectory(run).plan()[0], Store(run).find(8))
    assert (known.earlier(9), known.earlier(10), known.earlier(11)) == (*lost, None)


def test_a_spike_is_measured_against_as_many_steps_as_the_guard_looks_back_on(run, monkeypatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 3)
    losses = [record["loss"] for record in journal.steps(journal.read(run)).values()]
    known = Past(run, RunDirectory(run).plan()[0], Store(run).find(8))
    assert known.window("loss", 9) == losses[5:8]
    for record in list(journal.steps(journal.read(run)).values())[8:]:
        known.add(record)
        assert known.window("loss", record["step"]) == losses[record["step"] - 4 : record["step"] - 1]


def test_where_the_journal_was_cut_the_checkpoint_knows_the_rest(run) -> None:
    whole = Past(run, RunDirectory(run).plan()[0], Store(run).find(12)).trainer_state(12)()
    path = run / "journal.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if '"step": 1' in line))
    assert Past(run, RunDirectory(run).plan()[0], Store(run).find(12)).trainer_state(12)() == whole
