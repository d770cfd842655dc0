"""The learning rate of an update: a pure function of (plan, step), so there is no scheduler to save."""

import math
from collections.abc import Callable

from finetune.recipe.schema import count_of

# how much is left of a decay, from 1 to 0 -> factor; `sqrt` is one minus the root of what is over (Hägele et al. 2024, arXiv 2405.18392)
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1.0 - math.cos(math.pi * left)),
    "sqrt": lambda left: 1.0 - math.sqrt(1.0 - left),
}


def wsd(progress: float, *, decay: float, decay_shape: str) -> float:
    """Warm-up, stable, decay: the peak, and a fall in the last part (Hu et al. 2024, arXiv 2404.06395), at most after warm-up."""
    return SHAPES[decay_shape](min(1.0, (1.0 - progress) / min(1.0, decay))) if decay else 1.0


# progress in [0, 1] after warm-up -> factor of the peak learning rate; a schedule's own keys are its keyword-only parameters
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": wsd,
    "inverse_sqrt": lambda progress, *, timescale: math.sqrt(timescale / (timescale + progress)),
}
STEP_COUNTS = ("decay", "timescale")
"""Keys that hold steps, or a share of all. A schedule gets them in the unit of its progress; None is the warm-up."""


def learning_rate(
    peak: float,
    schedule: str,
    warmup_steps: int,
    steps: int,
    step: float,
    *,
    min_learning_rate: float = 0.0,
    **settings: object,
) -> float:
    """The learning rate of update `step` (1 to `steps`), or of a place between two.

    It rises linearly to `peak` over `warmup_steps` updates, then follows `schedule`, which would reach its end one
    update after the last, so that no update is wasted on a rate of zero. That end is `min_learning_rate`. `settings` are that schedule's
    own keys.
    """
    if step <= warmup_steps:
        return peak * (step / warmup_steps)  # in this order the last of them is the peak exactly
    length = max(1, steps - warmup_steps)
    for key in settings.keys() & STEP_COUNTS:
        given = settings[key]
        settings[key] = (count_of(given, steps) if isinstance(given, int | str) else max(1, warmup_steps)) / length
    factor = SCHEDULES[schedule]((step - warmup_steps - 1) / length, **settings)
    # in this form a factor of 1 gives the peak exactly, and without a floor nothing is rounded otherwise
    return peak * factor + min_learning_rate * (1.0 - factor)
