"""What a tracker is: three functions that hear the figures of a run. None of them can change or end a training."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from finetune.plan.plan import Plan
from finetune.store.run.directory import RunDirectory


class Start(NamedTuple):
    """What a tracker knows when it starts."""

    run: RunDirectory
    id: str
    """The run's own, the same in every attempt: a tracker continues what it has under it."""
    plan: Plan
    step: int
    """Where this attempt goes on. What a tracker has of later steps is out of date."""


class Tracker(Protocol):
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step. A step may have them twice: of its update, and of its evaluation."""

    def finish(self) -> None:
        """The attempt ends, however it does."""


Starter = Callable[[Start], Tracker]
"""It reads its own section of `plan.recipe.trackers`. OSError where it cannot work, as in the other two functions."""
