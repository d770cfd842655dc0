"""Where the figures of a training also go.

A tracker `x` of the recipe is the `start` of the file `x.py` here, and its section in `recipe/schema/trackers.py`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module

from finetune.recipe.schema.trackers import Trackers
from finetune.training.trackers.tracker import Start, Starter, Tracker

TRACKERS: dict[str, Starter] = {name: import_module(f"{__name__}.{name}").start for name in Trackers.model_fields}


class Tracked:
    """The trackers that a recipe asks for. One that fails is dropped, and said: a training does not end for it."""

    def __init__(self, start: Start, say: Callable[[str], None]):
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        for name, settings in start.plan.recipe.trackers:
            if settings is not None:
                try:
                    self._trackers[name] = TRACKERS[name](start)
                # Only what a disk or network refuses: a bug in a tracker still shows.
                except OSError as error:
                    self._drop(name, error)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # A copy, because a tracker that fails is dropped meanwhile.
        for name, tracker in [*self._trackers.items()]:
            try:
                tracker.log(step, figures)
            except OSError as error:
                self._drop(name, error)

    def finish(self) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                tracker.finish()
            except OSError as error:
                self._drop(name, error)

    def _drop(self, name: str, error: OSError) -> None:
        self._trackers.pop(name, None)
        self._say(f"tracker {name} stopped: {error.strerror or error}; training goes on without it")
