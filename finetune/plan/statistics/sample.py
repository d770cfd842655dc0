"""The results of models on the same rows, in units that are drawn independently: rows, or clusters of rows.

A figure is a ratio of two sums over units, like nats over tokens. Both sums vary with the draw, so its error is that of a ratio (Cochran,
Sampling Techniques, 1977, section 6.4).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Sample:
    sums: np.ndarray
    """Of a measure, float64 (K, N): K models, N units."""
    weights: np.ndarray
    """What the sums are divided by, like tokens, float64 (N,)."""

    @property
    def units(self) -> int:
        return len(self.weights)

    @cached_property
    def is_binary(self) -> bool:
        """Whether each unit is right or wrong, and counts once."""
        return bool((self.weights == 1).all() and ((self.sums == 0) | (self.sums == 1)).all())

    @cached_property
    def values(self) -> np.ndarray:
        """The figure of each model, (K,)."""
        return self.sums.sum(axis=1) / self.weights.sum()

    def less(self, baseline: int) -> "Sample":
        """The differences of each model to one of them."""
        return Sample(self.sums - self.sums[baseline], self.weights)

    @cached_property
    def residuals(self) -> np.ndarray:
        """What each unit adds to the error of each figure, (K, N); every row's sum is 0."""
        return (self.sums - np.outer(self.values, self.weights)) / self.weights.sum()

    @cached_property
    def without(self) -> np.ndarray:
        """How each figure falls when a unit is left out, less the mean over units, (K, N): the jackknife in closed form."""
        fallen = self.residuals / (1 - self.weights / self.weights.sum())
        return fallen - fallen.mean(axis=1, keepdims=True)

    @cached_property
    def errors(self) -> np.ndarray:
        """The standard error of each figure by the jackknife, (K,); infinite for a single unit."""
        if self.units < 2:
            return np.full(len(self.sums), np.inf)
        return np.sqrt((1 - 1 / self.units) * (self.without**2).sum(axis=1))

    @cached_property
    def freedom(self) -> np.ndarray:
        """The degrees of freedom of each error, (K,): fewer than the units where a few of them make most of it (Satterthwaite)."""
        squares = (self.residuals**2).sum(axis=1)
        fourths = (self.residuals**4).sum(axis=1)
        kurtosis = np.divide(self.units * fourths, squares**2, out=np.full(len(squares), 3.0), where=squares > 0)
        return np.clip(2 * self.units / np.maximum(kurtosis - 1, 1e-9), 3, self.units - 1)


def grouped(sums: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> Sample:
    """The same rows with each group as one unit; `groups` are numbers from 0, int64 (N,)."""
    count = int(groups.max(initial=-1)) + 1
    added = [np.bincount(groups, row, minlength=count) for row in (*sums, weights)]
    return Sample(np.array(added[:-1]), added[-1])
