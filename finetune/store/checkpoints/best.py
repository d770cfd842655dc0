"""The commit that `@best` names, and what to know of it: the evaluations that were not kept, and the base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.plan.facts import Metrics
from finetune.plan.retention import Saved, best
from finetune.plan.statistics import choice
from finetune.store import evaluations
from finetune.store.evaluations import HELD_OUT, Evaluation
from finetune.store.run.records import EventRecord


class Chosen(NamedTuple):
    step: int
    lowest: int
    """The commit with the lowest held-out loss."""

    @property
    def told(self) -> list[str]:
        if self.step == self.lowest:
            return []
        return [
            f"the best commit is step {self.step}: step {self.lowest} has the lowest held-out loss, and the held-out rows cannot tell them apart"
        ]


def chosen(run: Path, commits: Sequence[Saved], evaluated: Mapping[int, Metrics]) -> Chosen | None:
    """The latest commit whose held-out loss is not distinguishable from the lowest, row by row: a lowest loss among many is luck in part,
    and a later commit has seen more rows. Where the results of rows are missing, the commit with the lowest loss. None without a loss.
    """
    if not (steps := best(commits, 1)):
        return None
    lowest = steps.pop()
    losses = {commit.step: commit.loss for commit in commits if commit.loss is not None}
    later = sorted((step for step in losses if step > lowest), reverse=True)
    candidates = max(len(losses), len(evaluated))
    if later and (rows := _rows(run, lowest, losses[lowest])):
        for step in later:
            others = _rows(run, step, losses[step])
            if others and _is_as_good(others, rows, candidates):
                return Chosen(step, lowest)
    return Chosen(lowest, lowest)


def _rows(run: Path, step: int, loss: float) -> Evaluation | None:
    """The evaluation that gave a commit its figure: after a rollback, a step has some of weights that were given up."""
    found = evaluations.read_all(evaluations.of_step(run, step))
    own = (each for each in found if each.about["set"] == HELD_OUT and each.about["metrics"].get("loss") == loss)
    return next(own, None)


def _is_as_good(one: Evaluation, lowest: Evaluation, candidates: int) -> bool:
    if one.about["data"] != lowest.about["data"] or not np.array_equal(one.contents, lowest.contents):
        return False
    sums, others = (each.columns["loss"] for each in (one, lowest))
    return not choice.is_worse(sums, others, lowest.tokens.astype(np.float64), candidates)


def notes(commits: Sequence[Saved], evaluated: Mapping[int, Metrics], first: int) -> list[str]:
    """Lines to read before you use the best commit; none if all is well. `first` is the first step the run could commit."""
    chosen = _best(commits)
    seen = _best([Saved(step, metrics) for step, metrics in evaluated.items() if step >= first])
    found = []
    if seen and (chosen is None or seen.loss < chosen.loss):
        kept = f"; the best commit is step {chosen.step}, at {chosen.loss:.4f}" if chosen else ""
        found.append(f"step {seen.step} had held-out loss {seen.loss:.4f} and was not kept{kept}")
    base = Saved(0, evaluated.get(0, {})).loss
    if chosen and base is not None and chosen.loss > base:
        found.append(
            f"the best commit, step {chosen.step}, is worse than the base: held-out loss {chosen.loss:.4f}, the base has {base:.4f}"
        )
    return found


class _Best(NamedTuple):
    step: int
    loss: float


def first_step(events: Sequence[EventRecord]) -> int:
    """The first step a run could commit, by its journal: a branch begins with a commit of another run."""
    return max([1, *(event["step"] for event in events if event.get("event") == "branched")])


def _best(saved: Sequence[Saved]) -> _Best | None:
    steps = best(saved, 1)
    return next((_Best(item.step, item.loss) for item in saved if item.step in steps and item.loss is not None), None)
