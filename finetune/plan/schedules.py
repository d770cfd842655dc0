"""The learning rate of an update: a pure function of (plan, step), so there is no scheduler to save."""

import math
from collections.abc import Callable

# progress in [0, 1] after warm-up -> factor of the peak learning rate; a schedule's own keys are its keyword-only parameters
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(peak: float, schedule: str, warmup_steps: int, steps: int, step: float, **settings: object) -> float:
    """The learning rate of update `step` (1 to `steps`), or of a place between two.

    It rises linearly to `peak` over `warmup_steps` updates, then follows `schedule`, which would reach its end one
    update after the last, so that no update is wasted on a rate of zero. `settings` are that schedule's own keys.
    """
    if step <= warmup_steps:
        return peak * (step / warmup_steps)  # in this order the last of them is the peak exactly
    progress = (step - warmup_steps - 1) / max(1, steps - warmup_steps)
    return peak * SCHEDULES[schedule](progress, **settings)
