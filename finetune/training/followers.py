"""The processes that follow a run beside its training: those of its trackers, and the one of its mirror."""

from collections.abc import Callable
from pathlib import Path

from finetune.recipe.schema import Recipe
from finetune.training.mirroring import Mirroring
from finetune.training.trackers.processes import Tracked


class Followers:
    def __init__(self, run: Path, recipe: Recipe, say: Callable[[str], None]):
        self._trackers = Tracked(run, [tracker.name for tracker in recipe.track], say)
        self._mirror = Mirroring(run, say) if recipe.mirror else None

    def look(self) -> None:
        """Says what there is to say, and starts again what failed. Takes microseconds."""
        self._trackers.look()
        if self._mirror:
            self._mirror.look()

    def finish(self) -> None:
        """The training has ended: waits, within limits, until all has arrived."""
        try:
            self._trackers.finish()
        finally:
            if self._mirror:
                self._mirror.finish()
