"""Whether an update is made: a pure function of the recipe, the step's figures and those of the steps before it.

`loop` asks before each update, on every rank, which all see the same figures and so come to the same verdict. What was decided
against the plan is an `Amendment`, which the journal and every later manifest carry.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from finetune.errors import counted
from finetune.recipe.schema import Guard
from finetune.store.run.records import AmendmentRecord, EventRecord

WINDOW = 128  # steps looked back on
ENOUGH = 32  # steps before which nothing is called a spike
LIMIT = 8.0  # robust standard deviations; a window of Gaussian noise passes it about once in 10^15 steps
NOISE_FLOOR = 0.02  # of the median: a very quiet stretch does not turn small changes into spikes


Action = Literal["skip", "rollback"]
Reason = Literal["not_finite", "spike"]


class Amendment(NamedTuple):
    """Steps that keep their number and their rows, and do not move the weights."""

    first: int
    last: int
    action: Action
    reason: Reason
    step: int
    """At which it was decided: `last`."""

    @classmethod
    def of(cls, record: AmendmentRecord | EventRecord) -> "Amendment":
        return cls(record["first"], record["last"], record["action"], record["reason"], record["step"])

    @property
    def record(self) -> AmendmentRecord:
        return {
            "first": self.first,
            "last": self.last,
            "action": self.action,
            "reason": self.reason,
            "step": self.step,
        }

    def covers(self, step: int) -> bool:
        return self.first <= step <= self.last


def amendments(carried: Iterable[AmendmentRecord], events: Iterable[EventRecord]) -> list[Amendment]:
    """What a manifest carries and what a journal's events say was decided, each once, by the first step."""
    recorded = (record for record in events if record["event"] == "amended")
    return sorted({*map(Amendment.of, carried), *map(Amendment.of, recorded)})


class Verdict(NamedTuple):
    """What is wrong with a step, and what follows: only a warning, no update, a rollback, or the end of the run."""

    action: Literal["warn", "skip", "rollback", "stop"]
    reason: Literal["not_finite", "spike", "skipped_rows"]
    quantity: str
    message: str
    is_amended: bool = False
    """It was decided before: nothing new is recorded."""

    @property
    def is_refused(self) -> bool:
        """Whether the weights stay as they are."""
        return self.action != "warn"


def without_rows(step: int) -> Verdict:
    """On a step of which all rows are to be skipped."""
    return Verdict("skip", "skipped_rows", "", f"all rows of step {step} are to be skipped", is_amended=True)


def judge(
    rule: Guard,
    step: int,
    figures: Mapping[str, float],
    window: Callable[[str, int], Sequence[float]],
    amendments: Sequence[Amendment],
) -> Verdict | None:
    """The verdict on a step; None where nothing is wrong. `window` gives a quantity in the steps before one, without skipped ones."""
    # First: a step that runs again is skipped again, whatever its figures are now.
    for amendment in amendments:
        if amendment.covers(step):
            message = f"skipped, as was decided at step {amendment.step}"
            return Verdict("skip", amendment.reason, "", message, is_amended=True)
    for quantity, value in figures.items():
        # Before spikes: a NaN compares as false with every bound.
        if not math.isfinite(value):
            return _bounded(
                rule, Verdict(rule.not_finite, "not_finite", quantity, f"{quantity} is {value}"), amendments
            )
    if rule.spike == "ignore":
        return None
    # Judged last: a warning must not hide a NaN in the next quantity.
    for quantity, value in figures.items():
        distance = spike(window(quantity, step), value)
        if distance is not None:
            message = f"{quantity} {value:.4g} lies {distance:.0f} deviations above the last steps"
            return _bounded(rule, Verdict(rule.spike, "spike", quantity, message), amendments)
    return None


def _bounded(rule: Guard, verdict: Verdict, amendments: Sequence[Amendment]) -> Verdict:
    """A run that goes wrong again and again is not fixed by skipping steps."""
    if verdict.action in ("skip", "rollback") and len(amendments) >= rule.limit:
        message = f"{verdict.message}, and {counted(len(amendments), 'time')} before this run was amended already (guard.limit)"
        return verdict._replace(action="stop", message=message)
    return verdict


def amendment(rule: Guard, step: int, verdict: Verdict) -> Amendment:
    """What a verdict to skip or to roll back does to the plan."""
    action: Action = "rollback" if verdict.action == "rollback" else "skip"
    reason: Reason = "spike" if verdict.reason == "spike" else "not_finite"
    span = rule.span if action == "rollback" else 1
    return Amendment(max(1, step - span + 1), step, action, reason, step)


def spike(history: Sequence[float], value: float) -> float | None:
    """How many robust standard deviations (1.4826 x median absolute deviation) `value` lies above the window, if too many."""
    window = history[-WINDOW:]
    if len(window) < ENOUGH:
        return None
    # Median and absolute deviation: a spike in the window does not raise the bar for the next one.
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(past - median) for past in window)
    distance = (value - median) / max(deviation, NOISE_FLOOR * abs(median), 1e-12)
    return distance if distance > LIMIT else None
