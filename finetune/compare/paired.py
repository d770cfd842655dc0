"""The results of several models, row by row: the rows that all of them have, by content, and what has to be said of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np

from finetune.errors import DataError
from finetune.plan.statistics.sample import Sample, grouped
from finetune.store.evaluations import Evaluation, Measure


@dataclass(frozen=True)
class Paired:
    metric: str
    measure: Measure
    contents: np.ndarray
    """What stands for each row's content, uint64 (N,); equal rows are one."""
    rows: np.ndarray
    """The number of each row in the first evaluation, int64 (N,)."""
    sums: np.ndarray
    """Of the measure, float64 (K, N)."""
    weights: np.ndarray
    """Tokens or rows, float64 (N,)."""
    unpaired: list[int]
    """Rows of each model that another one lacks, or has in other tokens."""
    not_finite: list[int]
    """Rows of each model whose figure is NaN or infinite, and another one's is not."""
    skipped: int
    """Rows that are NaN or infinite for every model."""

    @cached_property
    def sound(self) -> list[int]:
        """The models that have a figure in each row. Of the others nothing can be said: to skip their bad rows would flatter them."""
        return [model for model, count in enumerate(self.not_finite) if not count]

    @cached_property
    def values(self) -> np.ndarray:
        """The figure of each model, NaN or infinite perhaps."""
        with np.errstate(invalid="ignore"):
            found: np.ndarray = self.sums.sum(axis=1) / self.weights.sum()
        return found

    def sample(self, clusters: np.ndarray | None = None) -> Sample:
        """The sound models; `clusters` are numbers of the rows' groups, int64 (N,)."""
        sums = self.sums[self.sound]
        return Sample(sums, self.weights) if clusters is None else grouped(sums, self.weights, clusters)


class _Rows(NamedTuple):
    """An evaluation with equal rows added up."""

    contents: np.ndarray
    rows: np.ndarray
    sums: np.ndarray
    weights: np.ndarray


def metrics_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """The measures that all evaluations have for each row."""
    first, *others = evaluations
    return [name for name in first.about["measures"] if all(name in each.about["measures"] for each in others)]


def paired(evaluations: Sequence[Evaluation], metric: str) -> Paired:
    """Pairs the rows of evaluations. DataError if they have no row or no such measure in common."""
    if metric not in (names := metrics_of(evaluations)):
        known = ", ".join(names) or "none"
        raise DataError(f"no measure `{metric}` of each row", hint=f"the measures that all have are: {known}")
    measure = evaluations[0].about["measures"][metric]
    each = [_added_up(evaluation, metric, measure) for evaluation in evaluations]
    contents = reduce(lambda one, two: np.intersect1d(one, two, assume_unique=True), (rows.contents for rows in each))
    places = [np.searchsorted(rows.contents, contents) for rows in each]
    weights = np.array([rows.weights[place] for rows, place in zip(each, places, strict=True)])
    # rows of other tokens have other losses, whatever the model
    kept = (weights == weights[0]).all(axis=0) & (weights[0] > 0)
    if not kept.any():
        hint = "evaluate them on the same rows, with the same tokenizer and template: --recipe FILE"
        raise DataError("the evaluations have no row in common, in the same tokens", hint=hint)
    sums = np.array([rows.sums[place][kept] for rows, place in zip(each, places, strict=True)])
    is_finite = np.isfinite(sums)
    usable = is_finite.any(axis=0)
    if not usable.any():
        raise DataError("every row is NaN or infinite for every ref", hint="nothing can be compared by this measure")
    return Paired(
        metric,
        measure,
        contents[kept][usable],
        each[0].rows[places[0]][kept][usable],
        sums[:, usable],
        weights[0][kept][usable],
        [int((rows.weights > 0).sum() - kept.sum()) for rows in each],
        (~is_finite[:, usable]).sum(axis=1).tolist(),
        int((~usable).sum()),
    )


def _added_up(evaluation: Evaluation, metric: str, measure: Measure) -> _Rows:
    contents, firsts, places = np.unique(evaluation.contents, return_index=True, return_inverse=True)
    column = evaluation.columns[metric]
    over = evaluation.tokens if measure["per"] == "tokens" else np.ones(len(column))
    with np.errstate(invalid="ignore"):  # inf and -inf are NaN
        sums, weights = (np.bincount(places, values, len(contents)) for values in (column, over))
    return _Rows(contents, evaluation.rows[firsts], sums, weights)
