"""Compares the best commit of a run with evaluations that were not kept, and with the base."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finetune.plan.facts import Metrics
from finetune.plan.retention import Saved, best
from finetune.store.run.records import EventRecord


def notes(commits: Sequence[Saved], evaluated: Mapping[int, Metrics], first: int) -> list[str]:
    """Lines to read before you use the best commit; none if all is well. `first` is the first step the run could commit."""
    chosen = _best(commits)
    seen = _best([Saved(step, metrics) for step, metrics in evaluated.items() if step >= first])
    found = []
    if seen and (chosen is None or seen.loss < chosen.loss):
        kept = f"; the best commit is step {chosen.step}, at {chosen.loss:.4f}" if chosen else ""
        found.append(f"step {seen.step} had held-out loss {seen.loss:.4f} and was not kept{kept}")
    base = Saved(0, evaluated.get(0, {})).loss
    if chosen and base is not None and chosen.loss > base:
        found.append(
            f"the best commit, step {chosen.step}, is worse than the base: held-out loss {chosen.loss:.4f}, the base has {base:.4f}"
        )
    return found


class _Best(NamedTuple):
    step: int
    loss: float


def first_step(events: Sequence[EventRecord]) -> int:
    """The first step a run could commit, by its journal: a branch begins with a commit of another run."""
    return max([1, *(event["step"] for event in events if event.get("event") == "branched")])


def _best(saved: Sequence[Saved]) -> _Best | None:
    steps = best(saved, 1)
    return next((_Best(item.step, item.loss) for item in saved if item.step in steps and item.loss is not None), None)
