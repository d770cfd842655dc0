"""Intervals of figures and of paired differences.

Figures that are right or wrong in each row have closed forms: a bootstrap of few wrong ones draws none of them, and its interval is too
short. All others have the BCa bootstrap (Efron 1987) of the figure in jackknife errors, with quantiles of Student's t: without both it is too
short where few units make most of the error (Hesterberg 2015, arXiv 1411.5279, section 3.2).
"""

import numpy as np

from finetune.plan.statistics import student
from finetune.plan.statistics.sample import Sample, grouped
from finetune.plan.statistics.student import NORMAL

RESAMPLES = 4000
MOST_UNITS = 2500
"""Units that are drawn one by one. More are drawn in this many random bundles, for a fraction of the time and the same figures; their errors
are still those of all units."""
_AT_ONCE = 1 << 20  # draws in memory
Intervals = np.ndarray
"""Low and high of each figure, (K, 2)."""


def deviations(sample: Sample, seed: int = 0) -> np.ndarray:
    """Bootstrap draws of each figure less the figure, in standard errors, float32 (RESAMPLES, K); 0 for one without an error.

    All figures are of the same draws of units, so their correlation is that of the rows.
    """
    random = np.random.Generator(np.random.SFC64(seed))
    if sample.units > MOST_UNITS:
        sample = grouped(sample.sums, sample.weights, random.permutation(sample.units) % MOST_UNITS)
    units, weights = sample.units, sample.weights / sample.weights.sum()
    errors = np.sqrt((sample.residuals**2).sum(axis=1, keepdims=True))
    # one column more: the weight of what is drawn
    columns = np.vstack([sample.residuals / np.where(errors > 0, errors, 1), weights]).T.astype(np.float32)
    drawn = []
    for first in range(0, RESAMPLES, size := max(1, _AT_ONCE // units)):
        count = min(size, RESAMPLES - first)
        places = random.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        counts = np.bincount(places.ravel(), minlength=count * units).reshape(count, units)
        sums = counts.astype(np.float32) @ columns
        drawn.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(drawn)


def bca(sample: Sample, draws: np.ndarray, level: float = 0.95) -> Intervals:
    """Bias-corrected and accelerated intervals; `draws` are the `deviations` of the sample."""
    found = np.empty((len(sample.values), 2))
    for number, column in enumerate(np.sort(draws, axis=0).T):
        below = (np.searchsorted(column, 0, "left") + np.searchsorted(column, 0, "right")) / (2 * len(column))
        bias = NORMAL.inv_cdf(min(max(below, 1 / len(column)), 1 - 1 / len(column)))
        without = sample.without[number]
        spread = (without**2).sum() ** 1.5
        acceleration = (without**3).sum() / (6 * spread) if spread > 0 else 0.0
        wide = student.quantile((1 + level) / 2, sample.freedom[number])
        for end, z in enumerate((-wide, wide)):
            moved = (bias + z) / max(1 - acceleration * (bias + z), 0.1)
            found[number, end] = column[round(NORMAL.cdf(bias + moved) * (len(column) - 1))]
    return sample.values[:, None] + sample.errors[:, None] * found


def at_once(middle: np.ndarray, errors: np.ndarray, draws: np.ndarray, units: int, level: float = 0.95) -> Intervals:
    """Intervals that hold for all figures at once, and so for the one you choose: by the largest deviation of each draw."""
    # the errors are estimated from so many units
    wide = student.quantile((1 + level) / 2, units - 1) / NORMAL.inv_cdf((1 + level) / 2)
    widest = wide * np.quantile(np.abs(draws).max(axis=1, initial=0), level)
    return middle[:, None] + np.outer(errors, (-widest, widest))


def of_shares(sample: Sample, level: float = 0.95) -> Intervals:
    """Wilson's intervals of shares of right rows."""
    z, rows, shares = NORMAL.inv_cdf((1 + level) / 2), sample.units, sample.values
    middle = (shares + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(shares * (1 - shares) / rows + z * z / (4 * rows * rows))
    return np.stack([middle - half, middle + half], axis=1)


def of_share_differences(differences: Sample, level: float = 0.95) -> Intervals:
    """Intervals of differences of two shares on the same rows, with a row added to each kind (Bonett and Price 2012)."""
    middle, errors = adjusted(differences)
    half = NORMAL.inv_cdf((1 + level) / 2) * errors
    return np.stack([np.maximum(middle - half, -1), np.minimum(middle + half, 1)], axis=1)


def adjusted(differences: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The differences of shares and their errors with a row added that only the one has right, and one that only the other has."""
    rows = differences.units + 2
    won, lost = ((differences.sums == side).sum(axis=1) + 1 for side in (1, -1))
    middle = (won - lost) / rows
    return middle, np.sqrt(((won + lost) / rows - middle**2) / rows)
