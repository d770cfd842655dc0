"""What a number of rows can show: the smallest difference that is found four times out of five."""

import numpy as np

from finetune.plan.statistics import student

LEVEL = 0.05
POWER = 0.8
USUAL_SPREADS = (0.03, 0.3)
"""Nats a token: how much the difference of two models varies from row to row. docs/comparing.md has the runs that it was seen in."""


def smallest(error: float, freedom: float, comparisons: int = 1, grain: float = 0.0) -> float:
    """The difference that a two-sided test finds with POWER, if the paired difference has this standard error. An exact test of figures
    that move in steps of `grain` needs a step more."""
    found = student.quantile(1 - LEVEL / (2 * max(comparisons, 1)), freedom)
    return (found + student.quantile(POWER, freedom)) * error + grain


def error_of(spread: float, weights: np.ndarray) -> float:
    """The standard error of a paired difference that varies so much from row to row, a token; `weights` are the tokens of each row."""
    return spread * float(np.sqrt((weights**2).sum()) / weights.sum())


def spread_of(error: float, weights: np.ndarray) -> float:
    """The inverse."""
    return error * float(weights.sum() / np.sqrt((weights**2).sum()))
