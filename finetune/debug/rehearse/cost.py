"""The cost of a checkpoint, from the journals of a few steps, and how often a run can afford one."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from finetune.plan.facts import World
from finetune.recipe.schema import Every
from finetune.store.run.journal import is_event, is_step
from finetune.store.run.records import EventRecord, Record

SHARE = 0.01  # of the time, for checkpoints


@dataclass(frozen=True)
class Cost:
    step_seconds: float
    blocked_seconds: float
    """An update waits this long for a save."""
    save_seconds: float
    """Until the checkpoint is durable, beside the training."""
    cpu_seconds: float
    """Of these, computing: digests, copies, system calls."""
    has_free_core: bool
    """Whether the writer computes on a core that the training leaves free."""

    @property
    def seconds(self) -> float:
        """Seconds that one save adds to a training, at most: on full cores the writer's computing counts too."""
        return self.blocked_seconds + (0.0 if self.has_free_core else self.cpu_seconds)

    def share(self, every: Sequence[Every]) -> float:
        """The share of the time that a cadence costs; of several cadences, the shortest counts."""
        seconds = min(item.steps * self.step_seconds if item.steps else (item.minutes or 0) * 60 for item in every)
        return self.seconds / max(seconds, self.step_seconds)

    def smallest_interval(self) -> int:
        """Steps between saves that cost at most `SHARE` of the time, and do not wait for each other."""
        return max(
            1, math.ceil(self.seconds / SHARE / self.step_seconds), math.ceil(self.save_seconds / self.step_seconds)
        )


def measure(journals: Iterable[Sequence[Record]], facts: World) -> Cost:
    """From the records of several runs; one of them saved at every step. The first step and save of a process warm it up and do not count.

    Only a save before another step blocks one. Its wait for earlier saves is not counted: it came too soon after them.
    """
    steps: list[float] = []
    saves: list[EventRecord] = []
    waits: list[float] = []
    for records in journals:
        for attempt in dict.fromkeys(record["attempt"] for record in records):
            own = [record for record in records if record["attempt"] == attempt]
            trained = [record for record in own if is_step(record)][1:]
            committed = [record for record in own if is_event(record) and record["event"] == "committed"]
            saved_before = {record["step"] + 1 for record in committed}
            steps += [record["seconds"] for record in trained if record["step"] not in saved_before]
            saves += committed[1:]
            followed = [record for record in committed[1:] if record["step"] < trained[-1]["step"]]
            waits += [record["blocked_ms"] / 1000 - record["wait_seconds"] for record in followed]
    return Cost(
        step_seconds=median(steps),
        blocked_seconds=max(0.0, median(waits)),
        save_seconds=median(record["save_seconds"] for record in saves),
        cpu_seconds=median(record["save_cpu_seconds"] for record in saves),
        has_free_core=_has_free_core(facts),
    )


def _has_free_core(facts: World) -> bool:
    """Whether the trained processes leave a core of this machine to others."""
    is_on_cpu = facts["device"].startswith("cpu")
    used = facts["world_size"] * (facts["threads"] if is_on_cpu else 1)
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return used < own
