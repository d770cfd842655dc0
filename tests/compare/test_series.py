"""The figures of a run as columns: which record of a step counts, and how a run is followed."""

import math

import numpy as np
import pytest

from finetune.compare.series import Series, smoothed
from tests.compare.made_runs import committed, evaluated, event, made, step, write


def read(run) -> Series:
    series = Series(run)
    series.update()
    return series


def test_the_last_record_of_a_step_counts_unless_a_rollback_took_it_back(tmp_path) -> None:
    rollback = event("amended", first=3, last=4, action="rollback", reason="spike", step=4, to=2)
    lines = [*(step(number, number) for number in (1, 2)), step(2, 2.5, "two"), step(3, 9.0), step(4, 9.5), rollback]
    series = read(made(tmp_path / "run", 9, [*lines, step(5, 1.5)]))
    assert series.steps.step.tolist() == [1, 2, 5]
    assert series.steps.figures["loss"].tolist() == [1.0, 2.5, 1.5]
    assert [steps.step.tolist() for steps in series.given_up] == [[3, 4]]
    assert [steps.figures["loss"].tolist() for steps in series.given_up] == [[9.0, 9.5]]


def test_a_training_is_followed(tmp_path) -> None:
    run = made(tmp_path / "run", 3)
    series = read(run)
    assert (len(series.steps.step), series.update()) == (0, False)
    write(run, [step(1, 3.0), evaluated(1, 2.5)])
    assert series.update()
    assert (series.steps.step.tolist(), series.evaluations[1]["loss"]) == ([1], 2.5)
    write(run, [step(2, 2.0), step(3, 1.0)])
    assert series.update() and not series.is_finished
    write(run, [committed(3)])
    assert series.update() and series.is_finished
    (run / "journal.jsonl").write_text(step(1, 7.0) + "\n")
    assert series.update()
    assert series.steps.figures["loss"].tolist() == [7.0]


def test_axes_count_from_the_first_step(tmp_path) -> None:
    series = read(made(tmp_path / "run", 9, [step(number, 1.0) for number in (4, 5, 6)]))
    assert series.steps.along("tokens").tolist() == [100, 200, 300]
    assert series.steps.along("hours").tolist() == pytest.approx([0.5 / 3600, 1 / 3600, 1.5 / 3600])
    assert series.steps.at("tokens", np.array([0, 3, 5, 6])).tolist() == [0, 0, 200, 300]


def test_what_is_not_finite_or_missing_stays_a_gap(tmp_path) -> None:
    series = read(made(tmp_path / "run", 9, [step(1, "nan"), step(2, "inf"), step(3, 1.0, seconds=0.0)]))
    assert [math.isfinite(loss) for loss in series.steps.figures["loss"]] == [False, False, True]
    assert np.isnan(series.steps.figure("router_loss")).all()
    assert np.isnan(series.steps.figure("tokens_per_second")).tolist() == [False, False, True]


def test_a_mean_of_steps_is_exact_after_a_spike() -> None:
    values = np.array([1.0, 1e30, np.nan, 1.0, 2.0, 3.0])
    assert smoothed(values, 1) is values
    assert smoothed(values, 3).tolist()[4:] == [2.0, 2.5]
    assert np.isnan(smoothed(values, 3)[2])
    assert smoothed(np.array([1.0, 3.0]), 9).tolist() == [1.0, 2.0]
