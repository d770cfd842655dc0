"""Which trials are due next, and what became of the others: a pure function of the sweep and its results.

No file says who won a rung. So every worker comes to the same answer, and a kill cannot leave half of one.
"""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Literal, NamedTuple

from finetune.compare.sweep.directory import Trial
from finetune.compare.sweep.spec import Spec
from finetune.plan.facts import Metrics

State = Literal["finished", "stopped", "failed", "unfinished"]


class Task(NamedTuple):
    number: int
    until: int | None
    """Train up to this step; None to the end."""


class Standing(NamedTuple):
    due: list[Task]
    alive: set[int]
    """The trials that halving has not stopped."""


def standing(spec: Spec, trials: Mapping[int, Trial]) -> Standing:
    """The trainings that can begin, or go on, now: those of one rung, and of the next one once all of these have ended."""
    alive = [*trials]
    if not spec.halving:
        open_ones = [trial for trial in trials.values() if not trial.is_finished and trial.reason is None]
        return Standing([Task(trial.number, None) for trial in open_ones], set(alive))
    for place, rung in enumerate(spec.rungs):
        sound = [number for number in alive if trials[number].reason is None]
        until = None if rung == spec.rungs[-1] else rung
        if due := [Task(number, until) for number in sound if rung not in trials[number].results]:
            return Standing(due, set(alive))
        if until:
            alive = ranked(sound, {number: trials[number].results[rung] for number in sound})[: spec.kept(place + 1)]
    return Standing([], set(alive))


def ranked(numbers: Sequence[int], metrics: Mapping[int, Metrics]) -> list[int]:
    """By held-out loss, the lowest first; of two equal ones the first trial. A loss that is not finite comes last."""
    return sorted(numbers, key=lambda number: (loss_of(metrics[number]), number))


def loss_of(metrics: Metrics) -> float:
    """The held-out loss; infinite if it is none. From a file NaN is read back as text."""
    loss = float(metrics["loss"])
    return loss if isfinite(loss) else inf


def state_of(trial: Trial, alive: set[int]) -> State:
    if trial.reason:
        return "failed"
    if trial.is_finished:
        return "finished"
    return "unfinished" if trial.number in alive else "stopped"
