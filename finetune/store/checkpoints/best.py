"""The commit that `@best` names, and what to know of it: the evaluations that were not kept, and the base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.plan.facts import Metrics
from finetune.plan.retention import LOSS, Saved, best
from finetune.plan.statistics import choice
from finetune.recipe.schema import Best, Judged
from finetune.store import evaluations
from finetune.store.evaluations import Evaluation
from finetune.store.run.records import EventRecord


class Chosen(NamedTuple):
    step: int
    lowest: int
    """The commit with the best figure."""
    metric: str = "loss"

    @property
    def told(self) -> list[str]:
        if self.step == self.lowest:
            return []
        return [
            f"the best commit is step {self.step}: step {self.lowest} has the best held-out {self.metric}, and the rows cannot tell them apart"
        ]


def chosen(run: Path, commits: Sequence[Saved], evaluated: Mapping[int, Metrics]) -> Chosen | None:
    """The latest commit whose figure is not distinguishable from the best one, row by row: the best among many is luck in part, and a
    later commit has seen more rows. Where the results of rows are missing, the commit with the best figure. None without a figure.
    """
    if not (steps := best(commits, 1)):
        return None
    lowest = steps.pop()
    figures = {commit.step: commit.figure for commit in commits if commit.figure is not None}
    by = commits[0].by
    later = sorted((step for step in figures if step > lowest), reverse=True)
    candidates = max(len(figures), len(evaluated))
    if later and (rows := rows_of(run, lowest, figures[lowest], by)):
        for step in later:
            others = rows_of(run, step, figures[step], by)
            if others and _is_as_good(others, rows, by, candidates):
                return Chosen(step, lowest, by.metric)
    return Chosen(lowest, lowest, by.metric)


def rows_of(run: Path, step: int, figure: float, by: Judged) -> Evaluation | None:
    """The evaluation that gave a step its figure: after a rollback, a step has some of weights that were given up."""
    name, metric = by.parts
    found = evaluations.read_all(evaluations.of_step(run, step))
    own = (each for each in found if each.about["set"] == name and each.about["metrics"].get(metric) == figure)
    return next((each for each in own if by.measure in each.columns), None)


def _is_as_good(one: Evaluation, lowest: Evaluation, by: Best, candidates: int) -> bool:
    if one.about["data"] != lowest.about["data"] or not np.array_equal(one.contents, lowest.contents):
        return False
    return not is_worse(one, lowest, by, candidates)


def is_worse(one: Evaluation, other: Evaluation, by: Judged, candidates: int) -> bool:
    """Whether the figure of one is worse than that of another on the same rows, which is the best of so many, and not by luck."""
    sign = 1 if by.is_lower else -1
    sums, others = (sign * each.columns[by.measure] for each in (one, other))
    is_by_token = other.about["measures"][by.measure]["per"] == "tokens"
    weights = other.tokens.astype(np.float64) if is_by_token else np.ones(len(others))
    return choice.is_worse(sums, others, weights, candidates)


def notes(commits: Sequence[Saved], evaluated: Mapping[int, Metrics], first: int, by: Best = LOSS) -> list[str]:
    """Lines to read before you use the best commit; none if all is well. `first` is the first step the run could commit."""
    name = f"held-out {by.metric}"
    chosen = _best(commits)
    seen = _best([Saved(step, metrics, by=by) for step, metrics in evaluated.items() if step >= first])
    found = []
    if seen and (chosen is None or seen.rank < chosen.rank):
        kept = f"; the best commit is step {chosen.step}, at {chosen.figure:.4f}" if chosen else ""
        found.append(f"step {seen.step} had {name} {seen.figure:.4f} and was not kept{kept}")
    base = _best([Saved(0, evaluated.get(0, {}), by=by)])
    if chosen and base and chosen.rank > base.rank:
        found.append(
            f"the best commit, step {chosen.step}, is worse than the base: {name} {chosen.figure:.4f}, the base has {base.figure:.4f}"
        )
    return found


class _Best(NamedTuple):
    step: int
    figure: float
    rank: float


def first_step(events: Sequence[EventRecord]) -> int:
    """The first step a run could commit, by its journal: a branch begins with a commit of another run."""
    return max([1, *(event["step"] for event in events if event.get("event") == "branched")])


def _best(saved: Sequence[Saved]) -> _Best | None:
    steps = best(saved, 1)
    for item in saved:
        if item.step in steps and item.figure is not None and item.rank is not None:
            return _Best(item.step, item.figure, item.rank)
    return None
