"""The figures of a run as columns, followed while it trains. Never imports torch."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.follow import Follower
from finetune.store.run.records import EventRecord, is_event, is_rollback, is_step

Axis = Literal["steps", "tokens", "hours"]
RECORDED = ("loss", "grad_norm", "learning_rate", "tokens", "seconds", "memory_bytes", "router_loss")
HELD_OUT = "held_out_"
"""Before the name of a figure of the held-out rows, as trackers have it; `docs/loss`, of an evaluation set, is told apart already."""
NO_FIGURES = ("rows", "tokens", "loss_stderr")  # of an evaluation: facts about its figures


@dataclass(frozen=True)
class Steps:
    """Steps in order, with their figures; NaN where a record has none."""

    step: np.ndarray
    """int64 (N,)"""
    figures: Mapping[str, np.ndarray]
    """float64 (N,) each."""

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens up to each step, counted from the run's first one."""
        return np.cumsum(np.nan_to_num(self.figures["tokens"]))

    @cached_property
    def hours(self) -> np.ndarray:
        """Hours in steps up to each one: without evaluations, waits for a save, and the time between two attempts."""
        return np.cumsum(np.nan_to_num(self.figures["seconds"])) / 3600

    def figure(self, name: str) -> np.ndarray:
        if name != "tokens_per_second":
            return self.figures[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            speed = self.figures["tokens"] / self.figures["seconds"]
        return np.where(np.isfinite(speed), speed, np.nan)

    def along(self, axis: Axis) -> np.ndarray:
        return self.step.astype(np.float64) if axis == "steps" else self.tokens if axis == "tokens" else self.hours

    def at(self, axis: Axis, steps: np.ndarray) -> np.ndarray:
        """The place of steps on an axis; of step 0 and of steps before the first one it is the beginning."""
        if axis == "steps":
            return steps.astype(np.float64)
        known = np.concatenate([[0.0], self.along(axis)])
        return known[np.searchsorted(self.step, steps, side="right")]


class Series:
    """A run's steps and events so far. `update` takes what its journal has since."""

    def __init__(self, run: Path):
        self.run = run
        self._begin()

    def _begin(self) -> None:
        plan, facts = RunDirectory(self.run).plan()
        self.plan: Plan = plan
        self.identity = facts["run"]
        self.events: list[EventRecord] = []
        self._follower = Follower(self.run)
        self._step = array("q")
        self._figures = {name: array("d") for name in RECORDED}
        self._given_up: list[
            tuple[int, int]
        ] = []  # a rollback: how many records were before it, and the first step it took back
        self._cache: tuple[int, Steps, list[Steps]] | None = None

    def update(self) -> bool:
        """Whether there was anything new."""
        if self._follower.is_replaced:
            self._begin()
        before = len(self._step) + len(self.events)
        for _, _, record in self._follower.read():
            if is_step(record):
                self._step.append(record["step"])
                for name, column in self._figures.items():
                    column.append(float(record.get(name, "nan")))  # type: ignore[arg-type]  # NaN and infinity are words
            elif is_event(record):
                self.events.append(record)
                if is_rollback(record):
                    self._given_up.append((len(self._step), record["first"]))
                if record["event"] == "extended":
                    self.plan = RunDirectory(self.run).plan()[0]
        return len(self._step) + len(self.events) > before

    @property
    def steps(self) -> Steps:
        """The valid record of each step: the last one, unless a rollback took it back."""
        return self._sorted()[0]

    @property
    def given_up(self) -> list[Steps]:
        """What each rollback took back."""
        return self._sorted()[1]

    @property
    def evaluations(self) -> dict[int, Metrics]:
        """Held-out figures by step, in order."""
        return dict(sorted(journal.evaluations(self.events).items()))

    @property
    def is_finished(self) -> bool:
        """Whether its last planned step is committed."""
        last = max((each["step"] for each in self.events if each["event"] == "committed"), default=0)
        return last >= self.plan.steps

    def _sorted(self) -> tuple[Steps, list[Steps]]:
        if self._cache is None or self._cache[0] != len(self._step) or len(self._cache[2]) != len(self._given_up):
            steps = np.frombuffer(self._step.tobytes(), dtype=np.int64)
            counts = np.ones(len(steps), dtype=bool)
            taken_back = []
            for count, first in self._given_up:
                lost = np.flatnonzero(counts[:count] & (steps[:count] >= first))
                taken_back.append(self._some(steps, lost))
                counts[lost] = False
            self._cache = (len(self._step), self._some(steps, np.flatnonzero(counts)), taken_back)
        return self._cache[1:]

    def _some(self, steps: np.ndarray, places: np.ndarray) -> Steps:
        """Of several records of a step the last one counts."""
        _, last = np.unique(steps[places][::-1], return_index=True)
        chosen = places[len(places) - 1 - last]
        columns = {name: np.frombuffer(column.tobytes(), dtype=np.float64) for name, column in self._figures.items()}
        return Steps(steps[chosen], {name: column[chosen] for name, column in columns.items()})


def held_out(evaluations: Mapping[int, Metrics]) -> dict[str, dict[int, float]]:
    """The held-out figures by name, each by step."""
    found: dict[str, dict[int, float]] = {}
    for step, metrics in evaluations.items():
        for name in (name for name in metrics if name.rpartition("/")[2] not in NO_FIGURES):
            found.setdefault(name, {})[step] = float(metrics[name])
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "loss", name))}


def is_held_out(name: str) -> bool:
    return name.startswith(HELD_OUT) or "/" in name


def smoothed(values: np.ndarray, count: int) -> np.ndarray:
    """The mean of `count` values around each, fewer at the ends; NaN and infinity are skipped, and stay."""
    if count == 1 or not len(values):
        return values
    finite, window = np.isfinite(values), np.ones(min(count, len(values)))
    # no difference of running sums: after a spike it would have lost the digits of all that follows
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    counts = np.convolve(finite.astype(np.float64), window, mode="same")
    return np.where(finite, sums / np.maximum(counts, 1), values)


def names_of(series: Sequence[Series]) -> Iterator[str]:
    """Every figure that one of these runs has."""
    for name in (*RECORDED, "tokens_per_second"):
        if any(np.isfinite(each.steps.figure(name)).any() for each in series):
            yield name
    found = (name for each in series for name in held_out(each.evaluations))
    yield from dict.fromkeys(name if "/" in name else f"{HELD_OUT}{name}" for name in found)
