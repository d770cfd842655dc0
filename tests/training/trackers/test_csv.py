"""`figures.csv` has a line a step, whatever ended the attempts before, and a training does not end for it."""

import csv
from pathlib import Path

import pytest

from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training.recorder import Recorder
from finetune.training.run import train as train_run
from finetune.training.trackers.csv import Table
from tests.training.trackers.story import STEPS, Told, assert_each_once, tell

CSV = ["csv"]


def table(run: Path) -> list[dict[str, str]]:
    with (run / "figures.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


@pytest.mark.slow
def test_the_table_has_the_figures_of_the_journal(recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(track=CSV), tmp_path / "run")
    records = journal.read(run)
    steps, lines = journal.steps(records), table(run)
    assert [int(line["step"]) for line in lines] == [*steps] == [*range(1, 11)]
    for line in lines:
        record = steps[int(line["step"])]
        assert all(float(line[name]) == record[name] for name in ("loss", "grad_norm", "learning_rate", "tokens"))
    held_out = {int(line["step"]): float(line["held_out_loss"]) for line in lines if line["held_out_loss"]}
    evaluated = {step: figures["loss"] for step, figures in journal.evaluations(records).items() if step}
    assert held_out == evaluated and set(held_out) == {10}


@pytest.mark.slow
def test_a_line_every_so_many_steps_and_one_for_each_evaluated_step(recipe_file, train, tmp_path) -> None:
    recipe = recipe_file(track=[{"name": "csv", "every": "4 steps"}], evaluate={"every": "3 steps"})
    assert [int(line["step"]) for line in table(train(recipe, tmp_path / "run"))] == [3, 4, 6, 8, 9, 10]


@pytest.mark.slow
def test_after_a_kill_no_step_has_two_lines(recipe_file, train, tmp_path, monkeypatch) -> None:
    recipe, run = recipe_file(track=CSV), tmp_path / "run"
    whole = table(train(recipe, tmp_path / "whole"))
    record = Recorder.step

    def die(self: Recorder, report: object) -> None:
        record(self, report)
        if self.past.newest_step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "step", die)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run)
    monkeypatch.undo()
    with (run / "figures.csv").open("a") as file:
        file.write("8,5.9")  # a line that a kill cut short
    train(recipe, run)
    kept = [{**line, "seconds": ""} for line in table(run)]
    assert kept == [{**line, "seconds": ""} for line in whole]


def test_a_killed_step_that_was_evaluated_has_its_line_and_a_rollback_leaves_one_line_a_step(tmp_path) -> None:
    path = tmp_path / "figures.csv"
    first = Table(path)
    first.back_to(-1)
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 2}, 0.0)
    first.log(3, {"held_out_loss": 7.0}, 0.0)  # and a kill: nothing is finished
    assert [(line["step"], line["held_out_loss"]) for line in table(tmp_path)] == [("1", ""), ("2", ""), ("3", "7.0")]
    again = Table(path)
    again.back_to(3)
    again.log(3, {"held_out_loss": 8.0}, 0.0)
    again.log(4, {"loss": 9.0}, 0.0)
    assert table(tmp_path)[2]["loss"] == "1.5" and table(tmp_path)[2]["held_out_loss"] == "8.0"
    again.back_to(1)  # a rollback
    again.log(2, {"loss": 0.25}, 0.0)
    again.log(3, {"loss": 0.5}, 0.0)
    assert [(line["step"], line["loss"]) for line in table(tmp_path)] == [("1", "0.5"), ("2", "0.25"), ("3", "0.5")]


@pytest.mark.parametrize("guard", [{}, {"spike": "rollback", "span": 3}], ids=["", "rollback"])
def test_twenty_kills_leave_each_step_once(guard, tmp_path, monkeypatch) -> None:
    told = Told(tmp_path / "run", "csv", guard)
    tell(told, "csv", 20, monkeypatch)
    has: dict = {}
    for line in table(told.run):
        for name, value in line.items():
            if name != "step" and value:
                has.setdefault(name, {}).setdefault(int(line["step"]), []).append(float(value))
    assert [int(line["step"]) for line in table(told.run)] == [*range(1, STEPS + 1)]
    assert_each_once(has, told, lambda name, step: step == 0)


@pytest.mark.slow
def test_a_table_that_cannot_be_written_ends_no_training(recipe_file, train, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    train_run(load(recipe_file()), run, is_quiet=True, until=4)
    (run / "figures.csv").mkdir()
    train(recipe_file(track=CSV), run)
    assert max(journal.steps(journal.read(run))) == 10
    said = capsys.readouterr().err
    assert "tracker csv: steps 1 to 10 did not arrive (IsADirectoryError: [Errno 21] Is a directory" in said


@pytest.mark.slow
def test_a_run_may_be_resumed_with_a_tracker_that_it_did_not_begin_with(recipe_file, train, tmp_path) -> None:
    run = tmp_path / "run"
    train_run(load(recipe_file()), run, is_quiet=True, until=4)
    plan_id = load_id(run)
    train(recipe_file(track=CSV), run)
    assert [int(line["step"]) for line in table(run)] == [*range(1, 11)], "the journal has the steps before, too"
    assert load_id(run) == plan_id


def load_id(run: Path) -> str:
    return RunDirectory(run).plan()[0].plan_id
