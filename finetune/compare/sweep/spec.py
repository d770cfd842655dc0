"""What a sweep is: its space, its method, and what followed from both when it began. `sweep.json` keeps it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.compare.sweep import space as spaces
from finetune.compare.sweep.space import Settings, Space

SCHEMA = 1


@dataclass(frozen=True)
class Spec:
    """What a sweep is: what you asked for, and what followed from it when it began."""

    space: Space
    method: str
    trials: int
    seed: int
    halving: int | None
    """Of the trials of a rung, one in this number reaches the next."""
    named_rungs: tuple[int, ...]
    """Those that you named."""
    rungs: tuple[int, ...]
    """The steps at which halving compares; the last is the whole length. Empty without halving."""
    threads: int
    """Of each training: another number would round otherwise, so a sweep keeps its own."""
    steps: int
    """Of all trials, as far as they are known before."""
    tokens: int
    memory_bytes: int
    """Of one training: the most among trials with other tensors or rows."""

    @property
    def tried(self) -> list[str]:
        """The keys in which trials differ."""
        return [key for key, axis in self.space.items() if len(axis.ends) > 1]

    @property
    def asked(self) -> dict[str, object]:
        """What the same command repeats."""
        halving = self.halving, self.named_rungs
        return asked_for(self.space, self.method, self.trials, self.seed, halving)

    def settings(self) -> list[Settings]:
        """Those of each trial; Optuna decides its own as it goes."""
        if self.method == "tpe":
            return []
        return settings_of(self.method, self.space, self.trials, self.seed)

    def kept(self, rung: int) -> int:
        """How many trials are trained to a rung, counted from 0."""
        return max(1, self.trials // (self.halving or 1) ** rung)

    def dump(self, recipe: str) -> bytes:
        """`recipe` is the digest of its text."""
        facts = {name: getattr(self, name) for name in FACTS}
        record = {"schema": SCHEMA, "recipe": recipe, **self.asked, "facts": facts}
        return (json.dumps(record, indent=1) + "\n").encode()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Spec":
        halving = record["halving"] or {"factor": None, "rungs": []}
        space = {key: spaces.axis_of(axis) for key, axis in record["set"].items()}
        asked = space, record["method"], record["trials"], record["seed"], halving["factor"], tuple(halving["rungs"])
        facts = {**record["facts"], "rungs": tuple(record["facts"]["rungs"])}
        return cls(*asked, **facts)


FACTS = ("rungs", "threads", "steps", "tokens", "memory_bytes")
"""What followed from the question when the sweep began."""


def asked_for(
    space: Space, method: str, trials: int, seed: int, halving: tuple[int | None, Sequence[int]]
) -> dict[str, object]:
    """A question as `sweep.json` has it."""
    factor, rungs = halving
    axes = {key: axis.record for key, axis in space.items()}
    halved = {"factor": factor, "rungs": [*rungs]} if factor else None
    return {"set": axes, "method": method, "trials": trials, "seed": seed, "halving": halved}


def settings_of(method: str, space: Space, trials: int, seed: int) -> list[Settings]:
    return spaces.grid(space) if method == "grid" else spaces.random(space, trials, seed)
