"""The weights of averages of checkpoints: pure functions of settings and steps. They sum to 1."""

import math
from collections.abc import Sequence
from itertools import pairwise

from finetune.plan.schedules import SHAPES

DECAYS = {"linear": SHAPES["linear"], "cosine": SHAPES["cosine"], "1-sqrt": SHAPES["sqrt"]}
"""The part of a decay that is left, from 1 to 0 -> factor of the learning rate."""


def normalised(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def of_ema(count: int, decay: float) -> list[float]:
    """Of an exponential moving average that begins with the first member and takes in the others one by one."""
    first, later = decay ** (count - 1), [(1 - decay) * decay**age for age in range(count - 2, -1, -1)]
    return [first, *later]


def of_decay(shape: str, steps: Sequence[int], window: int) -> list[float]:
    """Of states at increasing steps, the last `window` of which a decay of the learning rate would have covered.

    If update u of the window had counted w(u) times, the last state would be the sum of the states weighted by w(u) - w(u + 1), with
    0 after the last update (WSM, arXiv 2507.17634, theorem 3.1). The first update counts in full and none counts 0, as in our
    schedules: w(u) is the shape at what is left before it. A state stands for all updates since the member before it.
    """
    decay, last = DECAYS[shape], steps[-1]
    ends = [last - window, *steps]
    return [decay((last - before) / window) - decay((last - step) / window) for before, step in pairwise(ends)]
