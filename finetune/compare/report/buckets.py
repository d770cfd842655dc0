"""Steps in buckets of equal width, so that a page of any run stays small: mean, lowest and highest of each figure, nothing sampled."""

import base64
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np

from finetune.compare.series import Steps

FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes", "router_loss")
MOST_STEPS = 20_000
"""Steps of all runs together that a page has one by one."""
MOST_BUCKETS = 8_000

Packed = str
"""An array of float64, little-endian, in base64: exact, NaN included, and smaller than its digits."""


class Figure(TypedDict):
    mean: Packed
    low: NotRequired[Packed]
    """Of buckets with several steps, like `high`."""
    high: NotRequired[Packed]


class Places(TypedDict):
    """Where points are on each axis."""

    steps: Packed
    tokens: Packed
    hours: Packed


class Buckets(Places):
    """Places are those of each bucket's last step."""

    counts: Packed
    figures: dict[str, Figure]


def width_of(counts: Sequence[int]) -> int:
    """Steps in a bucket for runs of these lengths: 1, 2 or 5 times a power of ten."""
    total = sum(counts)
    if total <= MOST_STEPS:
        return 1
    sizes = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    return next(size for size in sizes if total <= size * MOST_BUCKETS)


def bucketed(steps: Steps, width: int) -> Buckets:
    """Bucket k has the steps from k * width + 1 on, so those of all runs have the same edges."""
    starts = np.flatnonzero(np.diff((steps.step - 1) // width, prepend=-1))
    ends = np.append(starts[1:], len(steps.step)) - 1 if len(starts) else starts
    figures = {name: _figure(steps.figure(name), starts, width) for name in FIGURES}
    return {
        **places_of(steps, ends),
        "counts": packed(np.diff(starts, append=len(steps.step))),
        "figures": {name: figure for name, figure in figures.items() if figure},
    }


def places_of(steps: Steps, chosen: np.ndarray) -> Places:
    return {
        "steps": packed(steps.step[chosen]),
        "tokens": packed(steps.tokens[chosen]),
        "hours": packed(steps.hours[chosen]),
    }


def _figure(values: np.ndarray, starts: np.ndarray, width: int) -> Figure | None:
    """None if no step has it."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.add.reduceat(np.where(finite, values, 0.0), starts) / counts
    if width == 1:
        return {"mean": packed(means)}
    known = np.where(finite, values, np.nan)
    return {
        "mean": packed(means),
        "low": packed(np.fmin.reduceat(known, starts)),
        "high": packed(np.fmax.reduceat(known, starts)),
    }


def packed(values: np.ndarray | Sequence[float], kind: str = "<f8") -> Packed:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def unpacked(values: Packed) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values), dtype="<f8")
