"""The remaining time of a training: steps by their tokens, evaluations and saves by the times of earlier ones."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from finetune.plan import cadence
from finetune.plan.plan import Plan
from finetune.recipe.schema import Every

FORECAST_AFTER_STEPS = 20
COUNTED_STEPS = 1_000  # beyond this many steps the mean is good enough, and looking up their rows would take seconds
FADING = 0.95  # weight of a step, relative to the next one


class Pace:
    """The speed of a training and its remaining work. The first step does not count, because it also makes buffers."""

    def __init__(self, tokens: float, evaluations: int, saves: int, evaluation_tokens: int = 0):
        """The remaining work; `evaluation_tokens` are those of one evaluation."""
        self.tokens = tokens
        self.left = {"evaluation": evaluations, "save": saves}
        self.evaluation_tokens = evaluation_tokens
        self.clock: Callable[[], float] = time.monotonic
        self.steps = 0
        self._seconds = self._tokens = 0.0
        self._taken: dict[str, list[float]] = {"evaluation": [], "save": []}
        self._mark = self.clock()

    def step(self, tokens: int) -> None:
        """A step has ended."""
        now = self.clock()
        if self.steps < 2:
            self._seconds = self._tokens = 0.0
        self._seconds = FADING * self._seconds + now - self._mark
        self._tokens = FADING * self._tokens + tokens
        self._mark = now
        self.steps += 1
        self.tokens -= tokens

    @contextmanager
    def aside(self, name: str, is_foreseen: bool = True) -> Iterator[None]:
        """An evaluation or a save between two steps; `is_foreseen` if the remaining work included it."""
        started = self.clock()
        yield
        seconds = self.clock() - started
        self._taken[name].append(seconds)
        self._mark += seconds
        if self.steps and is_foreseen:  # anything before the first step was not counted
            self.left[name] = max(0, self.left[name] - 1)

    def seconds_of(self, name: str) -> float:
        """Seconds of one future evaluation or save."""
        taken = self._taken[name]
        if taken:
            return sum(taken) / len(taken)
        # a forward is about a third of a step
        return self.evaluation_tokens * self.seconds_per_token / 3 if name == "evaluation" else 0.0

    @property
    def seconds_per_token(self) -> float:
        return self._seconds / self._tokens

    @property
    def seconds_left(self) -> float:
        beside = sum(count * self.seconds_of(name) for name, count in self.left.items())
        return max(0.0, self.tokens) * self.seconds_per_token + beside

    def forecast(self) -> dict[str, float]:
        """The figures of the journal's event."""
        return {
            "seconds_left": round(self.seconds_left, 3),
            "tokens_left": round(self.tokens),
            "tokens_per_second": round(1 / self.seconds_per_token, 3),
            "evaluations_left": self.left["evaluation"],
            "evaluation_seconds": round(self.seconds_of("evaluation"), 3),
            "saves_left": self.left["save"],
            "save_seconds": round(self.seconds_of("save"), 3),
        }


def ahead(plan: Plan, start: int, end: int) -> Pace:
    """The work after step `start`, up to step `end`; without saves by the minute and of the best evaluation so far."""
    recipe = plan.recipe
    holdout = plan.holdout_counts
    saves = {end} | _multiples(cadence.saves(recipe), start, end)
    evaluated = saves if recipe.checkpoint.keep.best else set()
    evaluations = _multiples([recipe.evaluate.every], start, end) | evaluated | {plan.steps}
    count = sum(step <= end for step in evaluations) if holdout.examples else 0
    return Pace(mean_tokens(plan, start, end), count, len(saves), holdout.tokens)


def mean_tokens(plan: Plan, start: int, end: int) -> float:
    """Tokens of the steps after `start` up to `end`, by their average."""
    order = plan.order
    examples = order.drawn_after(end) - order.drawn_after(start)
    return plan.counts.tokens * examples / plan.counts.examples


def tokens_of(plan: Plan, lengths: np.ndarray, start: int, end: int) -> float:
    """The same, counted exactly for few steps; `lengths` are the tokens of each example."""
    if end - start > COUNTED_STEPS:
        return mean_tokens(plan, start, end)
    return float(sum(lengths[plan.examples_of(step)].sum() for step in range(start + 1, end + 1)))


def largest_step(plan: Plan, lengths: np.ndarray) -> int:
    """Tokens of the largest step; with many steps, only of the first ones."""
    return max(int(lengths[plan.examples_of(step)].sum()) for step in range(1, min(plan.steps, COUNTED_STEPS) + 1))


def _multiples(cadences: Iterable[Every | None], start: int, end: int) -> set[int]:
    """The steps after `start` up to `end` at which one of the cadences falls due."""
    steps = [cadence.steps for cadence in cadences if cadence and cadence.steps]
    return {step for every in steps for step in range(start - start % every + every, end + 1, every)}
