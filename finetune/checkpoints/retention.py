"""Floor 0. Which checkpoints stay. Pure functions of steps and metrics; `run` removes what they leave out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from finetune.recipe.schema import Every, Keep


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint as the rules see it."""

    step: int
    metrics: dict[str, object]

    @property
    def loss(self) -> float | None:
        """The held-out loss, if the checkpoint was evaluated and the loss is a number that can be compared."""
        loss = self.metrics.get("loss")
        return float(loss) if isinstance(loss, int | float) and isfinite(loss) else None


def last(saved: Sequence[Saved], count: int) -> set[int]:
    return set(sorted(item.step for item in saved)[-count:])


def best(saved: Sequence[Saved], count: int) -> set[int]:
    """The lowest held-out losses among those evaluated; of two equal ones the later, which has seen more rows."""
    evaluated = [(item.loss, -item.step) for item in saved if item.loss is not None]
    return {-step for _, step in sorted(evaluated)[:count]}


def every(saved: Sequence[Saved], cadence: Every) -> set[int]:
    return {item.step for item in saved if item.step % cadence.steps == 0}


RULES: dict[str, Callable[[Sequence[Saved], int | Every], set[int]]] = {"last": last, "best": best, "every": every}


def keep(checkpoints: Sequence[Saved], rule: Keep, protected: set[int]) -> set[int]:
    """The steps that stay: the newest, the best, the protected ones (parents of branches, published), and what the rules name."""
    kept = last(checkpoints, 1) | best(checkpoints, 1) | protected & {item.step for item in checkpoints}
    for name, setting in rule:
        if setting is not None:
            kept |= RULES[name](checkpoints, setting)
    return kept
