"""What a tracker is: a client that gets the figures and events of a run, in a process beside the training."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from finetune.plan.plan import Plan
from finetune.recipe.schema.trackers import TrackerFacts
from finetune.store.run.directory import RunDirectory


class Has(NamedTuple):
    """The newest figures that a tracker has."""

    step: int
    """Of an update."""
    evaluated: int
    """The step of held-out ones."""


class Start(NamedTuple):
    """What a tracker knows when it starts."""

    run: RunDirectory
    id: str
    """The run's own, the same in every attempt: a tracker continues what it has under it."""
    plan: Plan

    @property
    def name(self) -> str:
        return self.run.path.absolute().name

    def settings(self, name: str) -> TrackerFacts:
        """Its section of the recipe. StopIteration if there is none."""
        return next(each for each in self.plan.recipe.track if each.name == name)

    @property
    def config(self) -> dict[str, object]:
        """What a tracker shows of a run beside its figures."""
        parent = self.plan.parent
        return {
            "run": self.id,
            "plan_id": self.plan.plan_id,
            "parent": parent.ref if parent else None,
            "parent_run": parent.run if parent else None,
            **self.plan.recipe.model_dump(mode="json", exclude={"track"}),
        }

    @property
    def flat_config(self) -> dict[str, str | int | float | bool]:
        """The same under dotted keys."""
        return dict(_flat(self.config))


class Tracker(Protocol):
    place: str
    """Where a person finds the run."""
    had: Has | None
    """What it had when it started. None if it had nothing, or takes figures back."""

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        """Figures of an update or an evaluation, each once. `time` is in seconds since 1970."""

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        """An event beside the steps, like `committed`."""

    def flush(self) -> None:
        """Returns when all that it got is durable, or with the client's own process."""

    def finish(self) -> None:
        """The attempt has ended, however it did."""


@runtime_checkable
class TakesBack(Protocol):
    """What some trackers can do as well. Others get only figures that stay."""

    def back_to(self, step: int) -> None:
        """Takes back all of later steps."""


Starter = Callable[[Start], Tracker]
"""Opens or continues the run at the tracker. It and the others may raise anything: their process is theirs."""


def _flat(value: object, key: str = "") -> "list[tuple[str, str | int | float | bool]]":
    if isinstance(value, Mapping):
        return [pair for name, child in value.items() for pair in _flat(child, f"{key}.{name}" if key else name)]
    if isinstance(value, list):
        return [pair for index, child in enumerate(value) for pair in _flat(child, f"{key}.{index}")]
    return [(key, value)] if isinstance(value, str | int | float) else []
