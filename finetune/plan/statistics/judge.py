"""The verdicts of a comparison: what the rows say of each model against one of them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.plan.statistics import intervals, power, significance
from finetune.plan.statistics.power import LEVEL
from finetune.plan.statistics.sample import Sample

FEWEST_UNITS = 6
"""Below, even the same sign in each unit is no evidence: 2 of 32 patterns of five signs have it."""
Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "equivalent", "not distinguishable"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    value: float
    interval: Interval | None
    """Of 95 %; None with too few units."""


@dataclass(frozen=True)
class Pair:
    model: int
    difference: float
    """Of the model to the baseline."""
    interval: Interval | None
    """Of 95 % for this pair alone."""
    at_once: Interval | None
    """Of 95 % for all pairs at once: it also holds for a pair that you pick because of its difference."""
    p_value: float
    corrected: float
    """The p-value, corrected for the number of pairs."""
    smallest: float | None
    """The smallest difference that these units find four times out of five, with so many pairs."""
    verdict: Verdict | None
    """Of the model against the baseline; None with too few units."""
    won: int
    """Units in which the model is better than the baseline."""
    lost: int


@dataclass(frozen=True)
class Judgement:
    figures: list[Figure]
    pairs: list[Pair]
    """One for each model but the baseline."""

    def best(self, baseline: int, better: Better) -> int:
        """The model to take: the best of those that are better than the baseline, or the baseline where none is."""
        winners = [pair for pair in self.pairs if pair.verdict == "better"]
        sign = 1 if better == "lower" else -1
        return min(winners, key=lambda pair: sign * pair.difference).model if winners else baseline


def judge(sample: Sample, baseline: int = 0, better: Better = "lower", margin: float | None = None) -> Judgement:
    """Compares each model with the baseline. A `margin` is the difference that does not matter: within it two models are equivalent."""
    models = [model for model in range(len(sample.sums)) if model != baseline]
    less = sample.less(baseline)
    differences = Sample(less.sums[models], less.weights)
    sign = 1 if better == "higher" else -1
    won, lost = ((sign * differences.sums * side > 0).sum(axis=1).tolist() for side in (1, -1))
    if sample.units < FEWEST_UNITS:
        figures = [Figure(value, None) for value in sample.values.tolist()]
        return Judgement(
            figures,
            [
                Pair(model, difference, None, None, 1.0, 1.0, None, None, *counts)
                for model, difference, *counts in zip(models, differences.values.tolist(), won, lost, strict=True)
            ],
        )
    of_values, of_pairs, at_once, errors = _intervals(sample, differences)
    grain = 1 / sample.units if sample.is_binary else 0.0
    p_values = significance.p_values(differences)
    corrected = significance.holm(p_values)
    outside = significance.holm(significance.within(differences, errors, margin)) if margin else np.ones(len(models))
    pairs = [
        Pair(
            model,
            difference := float(differences.values[number]),
            _interval(of_pairs[number]),
            _interval(at_once[number]),
            float(p_values[number]),
            float(corrected[number]),
            _smallest(errors[number], differences.freedom[number], len(models), grain),
            _verdict(sign * difference, float(corrected[number]), float(outside[number])),
            won[number],
            lost[number],
        )
        for number, model in enumerate(models)
    ]
    figures = [Figure(value, _interval(each)) for value, each in zip(sample.values.tolist(), of_values, strict=True)]
    return Judgement(figures, pairs)


def _intervals(sample: Sample, differences: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the values, of the differences one by one and at once, and the errors of the differences."""
    count = len(sample.sums)
    draws = intervals.deviations(Sample(np.vstack([sample.sums, differences.sums]), sample.weights))
    if sample.is_binary:
        middle, errors = intervals.adjusted(differences)
        of_values, of_pairs = intervals.of_shares(sample), intervals.of_share_differences(differences)
    else:
        middle, errors = differences.values, differences.errors
        of_values, of_pairs = intervals.bca(sample, draws[:, :count]), intervals.bca(differences, draws[:, count:])
    return of_values, of_pairs, intervals.at_once(middle, errors, draws[:, count:], sample.units), errors


def _smallest(error: float, freedom: float, comparisons: int, grain: float) -> float | None:
    """None for two models with the same figures, whose difference has no error."""
    return float(power.smallest(error, freedom, comparisons, grain)) if error else None


def _verdict(gain: float, corrected: float, outside: float) -> Verdict:
    if outside <= LEVEL:
        return "equivalent"
    if corrected > LEVEL:
        return "not distinguishable"
    return "better" if gain > 0 else "worse"


def _interval(ends: np.ndarray) -> Interval:
    low, high = ends.tolist()
    return low, high
