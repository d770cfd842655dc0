"""Student's t by way of the normal distribution, and the tails of both."""

from math import expm1, inf, log1p, sqrt
from statistics import NormalDist

NORMAL = NormalDist()


def upper_tail(t: float, freedom: float) -> float:
    """The probability of more than `t`; from 5 degrees of freedom on within 2 % of the right `t`.

    Wallace, Ann. Math. Stat. 30 (1959): its error is bounded in the normal deviate, so it holds in the far tail as well.
    """
    if t in (inf, -inf):
        return 0.0 if t > 0 else 1.0
    z = (8 * freedom + 1) / (8 * freedom + 3) * sqrt(freedom * log1p(t * t / freedom))
    return NORMAL.cdf(-z if t > 0 else z)


def quantile(level: float, freedom: float) -> float:
    """The inverse of the same formula: `level` of Student's t is below."""
    z = NORMAL.inv_cdf(level)
    t = sqrt(freedom * expm1((z * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom))
    return t if z > 0 else -t
