"""The curve of the learning rate over a run's steps: its warm-up, its length, and the place of a step on it."""

from collections.abc import Sequence

from finetune.plan.pinned import EarlierOrder
from finetune.recipe.schema import Recipe, count_of


def warmup_of(recipe: Recipe, steps: int, start: int = 0, earlier: Sequence[EarlierOrder] = ()) -> int:
    """Steps of warm-up in the curve from step `start` to the plan's end; a share counts on the curve's own length."""
    length = on_curve(steps, steps, earlier, start)[1] - start
    return min(length, count_of(recipe.optimizer.warmup, length))


def on_curve(step: int, steps: int, earlier: Sequence[EarlierOrder], start: int) -> tuple[float, int]:
    """The place of a step on its curve of the learning rate, and the last step of that curve.

    A curve from before a branch changed the batch size keeps its planned length: the remaining steps cover the rest of it.
    """
    at: float = step
    for change in reversed(earlier):
        if change.until <= start:
            break
        if at > change.until and steps != change.steps:
            at = change.until + (at - change.until) * (change.steps - change.until) / (steps - change.until)
        steps = change.steps
    return at, steps
