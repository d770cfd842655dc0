"""Paired tests of differences, and what becomes of their p-values when there are several."""

from math import log

import numpy as np

from finetune.plan.statistics import student
from finetune.plan.statistics.sample import Sample

MOST_FLIPPED = 1000
"""Units up to which signs are flipped. With more, Student's t says the same, at no cost."""
FLIPS = 10_000
_AT_ONCE = 1 << 20


def p_values(differences: Sample, seed: int = 0) -> np.ndarray:
    """Two-sided p-values that each difference is 0, (K,); 1 where all units are equal.

    Rows that are right or wrong have McNemar's exact test. Few others have the exact test that flips the signs of differences: it
    assumes no distribution, and the losses of rows have long tails.
    """
    if np.isin(differences.sums, (-1, 0, 1)).all() and (differences.weights == 1).all():
        return np.array([mcnemar(int((row == 1).sum()), int((row == -1).sum())) for row in differences.sums])
    if differences.units <= MOST_FLIPPED:
        return sign_flips(differences.sums, seed)
    pairs = zip(differences.values, differences.errors, strict=True)
    return np.array([2 * student.upper_tail(abs(ratio(*pair)), differences.units - 1) for pair in pairs])


def mcnemar(won: int, lost: int) -> float:
    """The exact test: of the rows that only one has right, either has each with probability one half."""
    rows, fewer = won + lost, min(won, lost)
    numbers = np.arange(fewer)
    chosen = np.concatenate([[0.0], np.cumsum(np.log((rows - numbers) / (numbers + 1)))])
    return min(1.0, 2 * float(np.exp(chosen - rows * log(2)).sum()))


def sign_flips(sums: np.ndarray, seed: int = 0) -> np.ndarray:
    """The share of sign patterns whose sum is as far from 0; of all patterns if they are at most FLIPS, else of FLIPS random ones."""
    rows, units = sums.shape
    observed = np.abs(sums.sum(axis=1))
    # sums of other orders are equal to rounding
    least = observed - 1e-9 * np.abs(sums).sum(axis=1)
    if 2**units <= FLIPS:
        patterns = np.arange(2**units)[:, None] >> np.arange(units) & 1
        return (np.abs(2 * patterns @ sums.T - sums.sum(axis=1)) >= least).mean(axis=0)
    # more where there are many to correct for: the lowest p-value has to survive that
    flips, reached = max(FLIPS, 40 * rows), np.zeros(rows)
    random = np.random.Generator(np.random.SFC64(seed))
    for first in range(0, flips, size := max(1, _AT_ONCE // units)):
        count = min(size, flips - first)
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-count * units // 8)), np.uint8), count=count * units)
        flipped = 2 * bits.reshape(count, units).astype(np.float64) @ sums.T - sums.sum(axis=1)
        reached += (np.abs(flipped) >= least).sum(axis=0)
    return (reached + 1) / (flips + 1)


def within(differences: Sample, errors: np.ndarray, margin: float) -> np.ndarray:
    """p-values that each difference is outside the margin: the larger of two one-sided tests (TOST, Schuirmann 1987), (K,)."""
    left = margin - np.abs(differences.values)
    return np.array(
        [student.upper_tail(ratio(*pair), differences.units - 1) for pair in zip(left, errors, strict=True)]
    )


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values corrected so that any false one among them is as rare as for one (Holm 1979), (K,)."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def ratio(value: float, error: float) -> float:
    """A value in its standard errors; 0 in 0 errors is 0."""
    if error > 0:
        return float(value / error)
    return float(np.sign(value) * np.inf) if value else 0.0
