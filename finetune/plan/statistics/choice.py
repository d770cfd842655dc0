"""Which of several checkpoints to take, where the lowest loss may be luck: in closed form, cheap enough for each evaluation of a training."""

from dataclasses import dataclass

import numpy as np

from finetune.plan.statistics import significance, student
from finetune.plan.statistics.judge import FEWEST_UNITS, Better
from finetune.plan.statistics.power import LEVEL
from finetune.plan.statistics.sample import Sample


@dataclass(frozen=True)
class Difference:
    """A paired difference of two figures on the same rows."""

    value: float
    error: float
    units: int

    @property
    def p_above(self) -> float:
        """The p-value that the difference is not above 0 (one-sided, Student's t); 1 where there are too few rows to say."""
        if self.units < FEWEST_UNITS:
            return 1.0
        return student.upper_tail(significance.ratio(self.value, self.error), self.units - 1)


def difference(sums: np.ndarray, less: np.ndarray, weights: np.ndarray) -> Difference:
    """Of two models on the same rows: `sums` and `less` of a measure, and what they are divided by, (N,) each."""
    sample = Sample((sums - less)[None], weights)
    return Difference(float(sample.values[0]), float(sample.errors[0]), sample.units)


def is_worse(sums: np.ndarray, lowest: np.ndarray, weights: np.ndarray, candidates: int) -> bool:
    """Whether a loss is above that of the lowest of so many candidates, and not by luck.

    The lowest is lowest by luck too, so the level is divided among those it was chosen from: when all are equally good, none of them is
    called worse in 95 % of all cases.
    """
    return difference(sums, lowest, weights).p_above <= LEVEL / max(candidates - 1, 1)


def leaders(sample: Sample, better: Better = "lower") -> list[int]:
    """The models that are not worse than the one with the best figure, in their order; it is one of them."""
    if not len(sample.sums):
        return []
    sums = sample.sums if better == "lower" else -sample.sums
    lowest = int(sums.sum(axis=1).argmin())
    candidates = len(sums)
    return [
        model
        for model in range(candidates)
        if model == lowest or not is_worse(sums[model], sums[lowest], sample.weights, candidates)
    ]
