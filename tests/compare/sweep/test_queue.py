"""Which trials are due: a pure function of the results, whoever asks and whenever."""

from dataclasses import replace

from finetune.compare.sweep import queue
from finetune.compare.sweep.directory import Reason, Trial
from finetune.compare.sweep.queue import Task, standing, state_of
from finetune.compare.sweep.space import Values
from finetune.compare.sweep.spec import Spec

SPACE = {"train.seed": Values(tuple(range(8)))}
GRID = Spec(SPACE, "grid", 8, 0, None, (), (), threads=1, steps=80, tokens=800, memory_bytes=1)
HALVING = replace(GRID, halving=2, rungs=(2, 4, 10))


def trials(losses: dict[int, dict[int, float | str]], failed: tuple[int, ...] = ()) -> dict[int, Trial]:
    """Trials with held-out losses by step."""
    made = {}
    for number in range(8):
        results = {step: {"loss": loss} for step, loss in losses.get(number, {}).items()}
        reason = Reason("not_finite", "loss is nan") if number in failed else None
        made[number] = Trial(number, {"train.seed": number}, results, is_finished=10 in results, reason=reason)
    return made


def test_a_grid_trains_all_that_is_neither_finished_nor_failed() -> None:
    due = standing(GRID, trials({1: {10: 3.0}}, failed=(2,))).due
    assert due == [Task(number, None) for number in (0, 3, 4, 5, 6, 7)]


def test_a_rung_waits_for_all_its_trials_and_sends_on_the_best() -> None:
    first = {number: {2: 5.0 - number} for number in range(7)}
    assert standing(HALVING, trials(first)).due == [Task(7, 2)]
    first[7] = {2: 4.5}
    found = standing(HALVING, trials(first))
    assert found.due == [Task(6, 4), Task(5, 4), Task(4, 4), Task(3, 4)]
    assert found.alive == {3, 4, 5, 6}


def test_the_last_rung_trains_to_the_end_and_then_nothing_is_due() -> None:
    losses = {number: {2: 5.0 - number} for number in range(8)}
    losses |= {number: {2: 5.0 - number, 4: float(number)} for number in (4, 5, 6, 7)}
    found = standing(HALVING, trials(losses))
    assert found.due == [Task(4, None), Task(5, None)]
    losses[4][10], losses[5][10] = 2.0, 1.0
    ended = trials(losses)
    found = standing(HALVING, ended)
    assert found.due == []
    states = [state_of(trial, found.alive) for trial in ended.values()]
    assert states == ["stopped"] * 4 + ["finished"] * 2 + ["stopped"] * 2


def test_a_failed_trial_makes_room_for_the_next_one() -> None:
    losses = {number: {2: 5.0 - number} for number in range(8)}
    found = standing(HALVING, trials(losses, failed=(7,)))
    assert [task.number for task in found.due] == [6, 5, 4, 3]


def test_a_loss_that_is_not_finite_comes_last_and_of_equal_ones_the_first_trial_counts() -> None:
    metrics = {0: {"loss": "nan"}, 1: {"loss": 2.0}, 2: {"loss": 2.0}, 3: {"loss": "inf"}, 4: {"loss": 1.0}}
    assert queue.ranked([*metrics], metrics) == [4, 1, 2, 0, 3]


def test_when_all_have_failed_nothing_is_due() -> None:
    assert standing(HALVING, trials({}, failed=tuple(range(8)))).due == []
