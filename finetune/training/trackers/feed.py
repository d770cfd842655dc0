"""What of a journal a tracker gets: the figures of each step once, as the run counts them.

A step that runs again after a kill, a rollback or a fall-back is in the journal twice.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from finetune.plan.metrics import tracked
from finetune.plan.plan import Plan
from finetune.recipe.schema.trackers import TrackerFacts
from finetune.store.run.follow import Line
from finetune.store.run.inspect import INCIDENTS, incident
from finetune.store.run.records import EventRecord, Record, StepRecord, is_event, is_number, is_rollback, is_step
from finetune.training.trackers.tracker import Has, TakesBack, Tracker

_ABOUT = ("kind", "event", "step", "attempt", "time", "skipped")


class Figures(NamedTuple):
    step: int
    is_evaluation: bool
    values: Mapping[str, float]
    time: float
    place: int
    """Of their line in the journal."""


class Feed:
    """Figures wait in it until they stay, for a tracker that takes nothing back."""

    def __init__(self, tracker: Tracker, plan: Plan, settings: TrackerFacts, has: Has, place: int):
        self._tracker = tracker
        self._plan = plan
        self._every = settings.every.steps if settings.every and settings.every.steps else 1
        self._held: list[Figures] = []
        self._passed_over: Figures | None = None
        """Of the newest step, which `every` skips unless the step is evaluated."""
        self._commits: list[int] = []
        self._newest = 0
        self._logged_place = place
        self.has = has
        self.noted = 0
        """Events before this place of the journal were noted."""

    @property
    def place_to_go_on(self) -> int:
        """Of the journal: what is before it is needed no more. The newest figures are: a tracker may drop those of its last step."""
        waiting = [*self._held[:1], *([self._passed_over] if self._passed_over else [])]
        return min([self._logged_place, *(figures.place for figures in waiting)])

    def hear(self, line: Line) -> None:
        """The next line of the journal."""
        record = line.record
        if is_step(record):
            self._hear_step(record, line.start)
        elif is_event(record) and record["event"] == "evaluated":
            self._hear_evaluation(record, line.start)
        elif is_event(record):
            self._hear_event(record, line)

    def _hear_step(self, record: StepRecord, place: int) -> None:
        step = self._newest = record["step"]
        values = _numbers(record)
        if record["seconds"] > 0:
            values["tokens_per_second"] = record["tokens"] / record["seconds"]
        figures = Figures(step, False, values, _time(record), place)
        is_due = step % self._every == 0
        self._passed_over = None if is_due else figures
        if is_due:
            self._held.append(figures)

    def _hear_evaluation(self, record: EventRecord, place: int) -> None:
        step = record["step"]
        if self._passed_over and self._passed_over.step == step:
            self._held.append(self._passed_over)
        self._passed_over = None
        self._held.append(Figures(step, True, tracked(_numbers(record)), _time(record), place))

    def _hear_event(self, record: EventRecord, line: Line) -> None:
        name, step = record["event"], record.get("step", self._newest)
        if name == "started":
            self._go_back(step)
        elif is_rollback(record):
            self._go_back(record["to"])
        elif name == "committed":
            self._commits.append(step)
        if line.end > self.noted and (text := _told(record)):
            self._tracker.note(step, name, text, _time(record))
            self.noted = line.end

    def _go_back(self, step: int) -> None:
        """Training goes on after a step: what was recorded of later ones is out of date."""
        self._held = [figures for figures in self._held if figures.step <= step]
        self._commits = [each for each in self._commits if each <= step]
        if self._passed_over and self._passed_over.step > step:
            self._passed_over = None
        self._newest = step
        if max(self.has) > step and isinstance(self._tracker, TakesBack):
            self._tracker.back_to(step)
            self.has = Has(*(min(each, step) for each in self.has))

    def release(self, is_caught_up: bool) -> None:
        """Logs what stays. `is_caught_up`: the journal has no more now."""
        bound = math.inf if isinstance(self._tracker, TakesBack) else self._last_that_stays(is_caught_up)
        released = [figures for figures in self._held if figures.step <= bound]
        self._held = self._held[len(released) :]
        for figures in released:
            # Steps that run again give the same figures: the journal says so where they do not.
            if figures.step > (self.has.evaluated if figures.is_evaluation else self.has.step):
                self._tracker.log(figures.step, figures.values, figures.time)
                if figures.is_evaluation:
                    self.has = self.has._replace(evaluated=figures.step)
                else:
                    self.has, self._logged_place = self.has._replace(step=figures.step), figures.place

    def _last_that_stays(self, is_caught_up: bool) -> float:
        """The last step that no rollback takes back. A kill takes back none: its steps run again, to the same figures."""
        guard = self._plan.recipe.guard
        if is_caught_up and guard.spike != "rollback":
            return math.inf
        # The guard goes back to the newest checkpoint before the span that it skips.
        reach = self._newest + 1 - guard.span if self._newest < self._plan.steps else math.inf
        within = [step for step in self._commits if step <= reach]
        self._commits = [*within[-1:], *self._commits[len(within) :]]
        return within[-1] if within else 0


def _numbers(record: Mapping[str, object]) -> dict[str, float]:
    figures = {name: value for name, value in record.items() if name not in _ABOUT and is_number(value)}
    return {name: float(value) if isinstance(value, str) else value for name, value in figures.items()}


def _time(record: Record) -> float:
    return datetime.fromisoformat(record["time"]).timestamp()


def _told(record: EventRecord) -> str | None:
    """The text of an event; None for those that are no matter of a tracker."""
    name = record["event"]
    if name == "started":
        return f"resumed from step {record['step']}" if record["step"] else "started"
    if name == "committed":
        return f"committed step {record['step']}"
    return incident(record)["message"] if name in INCIDENTS else None
