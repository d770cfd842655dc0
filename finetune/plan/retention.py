"""The checkpoints to keep, in full or as weights alone. Pure functions of steps and metrics.

You can resume from a full checkpoint. Weights alone take a third of the bytes; you can compare, average and package them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple, Protocol

from finetune.plan.facts import Metrics
from finetune.recipe.schema import Best, Every, KeepWhole

LOSS = Best()


class Committed(Protocol):
    """What the store knows of a checkpoint without reading it."""

    @property
    def step(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def metrics(self) -> Metrics: ...


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint as the rules see it."""

    step: int
    metrics: Metrics
    is_full: bool = True
    by: Best = LOSS
    """The figure that chooses."""

    @classmethod
    def of(cls, item: Committed, evaluated: Mapping[int, Metrics], by: Best = LOSS) -> "Saved":
        """With the figures of its manifest, or those that were computed later."""
        return cls(item.step, item.metrics or evaluated.get(item.step, {}), item.kind == "full", by)

    @property
    def figure(self) -> float | None:
        """The figure that chooses, if the checkpoint was evaluated and it is a number that can be compared."""
        figure = self.metrics.get(self.by.metric)
        return float(figure) if isinstance(figure, int | float) and isfinite(figure) else None

    @property
    def rank(self) -> float | None:
        """The same as a number of which the lowest is best."""
        return self.figure if self.figure is None or self.by.is_lower else -self.figure


def last(saved: Sequence[Saved], count: int) -> set[int]:
    """The newest `count` that can be resumed from."""
    return set(sorted(item.step for item in saved if item.is_full)[-count:])


def best(saved: Sequence[Saved], count: int) -> set[int]:
    """The best figures among those evaluated; of two equal ones the later, which has seen more rows."""
    evaluated = [(item.rank, -item.step) for item in saved if item.rank is not None]
    return {-step for _, step in sorted(evaluated)[:count]}


def every(saved: Sequence[Saved], cadence: Every) -> set[int]:
    """Those at the multiples of a cadence of steps."""
    return {item.step for item in saved if cadence.steps and item.step % cadence.steps == 0}


# of the checkpoints and a rule's own setting
RULES: dict[str, Callable[..., set[int]]] = {"last": last, "best": best, "every": every, "weights_every": every}
AS_WEIGHTS = {"weights_every"}  # the rules whose steps may be demoted


class Kept(NamedTuple):
    full: set[int]
    weights: set[int]
    """Steps that stay as weights alone; disjoint from `full`."""


def keep(checkpoints: Sequence[Saved], rule: KeepWhole, protected: set[int]) -> Kept:
    """The steps that stay: the newest, the best, the protected ones (parents of branches, published), and what the rules name."""
    full = last(checkpoints, 1) | best(checkpoints, 1) | protected & {item.step for item in checkpoints}
    weights: set[int] = set()
    for name, setting in rule:
        if setting is not None:
            count = setting.count if isinstance(setting, Best) else setting
            (weights if name in AS_WEIGHTS else full).update(RULES[name](checkpoints, count))
    demoted = {item.step for item in checkpoints if not item.is_full}
    return Kept(full - demoted, (weights | full & demoted) - (full - demoted))
