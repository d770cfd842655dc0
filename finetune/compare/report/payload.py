"""Everything that the page of a report shows, as one object: numbers packed, all else text."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np

from finetune.compare.report import buckets, evidence, summary, timeline
from finetune.compare.report.buckets import Buckets, Packed, Places, packed
from finetune.compare.report.evidence import Evidence, Key, Sampled
from finetune.compare.report.heat import Heat, heat
from finetune.compare.report.summary import Table
from finetune.compare.report.timeline import Timeline
from finetune.compare.report.weights import Weights
from finetune.compare.series import Series, held_out
from finetune.plan.facts import Metrics
from finetune.store.evaluations import HELD_OUT
from finetune.store.run.journal import now

WITHIN = 1.96  # standard errors: 95 % of a normal distribution
MOST_POINTS = 4000
"""Evaluations of all runs together, for each figure; of more, every second, third, … one."""


Point = TypeVar("Point")


class Points(Places):
    value: Packed
    low: Packed
    """NaN where no interval is known."""
    high: Packed


class GivenUp(Places):
    loss: Packed


class RunData(TypedDict):
    name: str
    planned: int
    recorded: int
    is_finished: bool
    steps: Buckets
    given_up: list[GivenUp]
    held_out: dict[str, Points]
    differences: dict[str, Points]
    timeline: Timeline
    modules: Heat | None


class Payload(TypedDict):
    created: str
    width: int
    """Steps in a bucket."""
    runs: list[RunData]
    comparison: Table
    recipe: Table
    baselines: dict[str, str]
    samples: list[Sampled]
    weights: list[Weights]
    notes: list[str]


class Asked(NamedTuple):
    baseline: str | None = None
    weights: tuple[Weights, ...] = ()


class Report:
    """A report that follows its runs."""

    def __init__(self, runs: Sequence[Path], asked: Asked):
        self._asked = asked
        self._series = [Series(run) for run in dict.fromkeys(runs)]
        self._files: list[list[Path]] | None = None
        self._evidence = Evidence()

    @property
    def series(self) -> list[Series]:
        return self._series

    def update(self) -> bool:
        """Whether there was anything new."""
        news = [each.update() for each in self._series]
        files = evidence.files_of(self._series)
        is_new = files != self._files
        if is_new:
            self._evidence = evidence.evidence(self._series, files, self._asked.baseline)
            self._files = files
        return is_new or any(news)

    def payload(self) -> Payload:
        width = buckets.width_of([len(each.steps.step) for each in self._series])
        return {
            "created": now(),
            "width": width,
            "runs": [self._run(place, each, width) for place, each in enumerate(self._series)],
            "comparison": summary.comparison(self._series, self._evidence),
            "recipe": summary.recipe_differences(self._series),
            "baselines": self._evidence.baselines,
            "samples": self._evidence.samples,
            "weights": list(self._asked.weights),
            "notes": summary.notes(self._series),
        }

    def _run(self, place: int, series: Series, width: int) -> RunData:
        steps = series.steps
        return {
            "name": str(series.run),
            "planned": series.plan.steps,
            "recorded": int(steps.step[-1]) if len(steps.step) else 0,
            "is_finished": series.is_finished,
            "steps": buckets.bucketed(steps, width),
            "given_up": [_given_up(series, each.step, each.figures["loss"]) for each in series.given_up],
            "held_out": {
                name: self._points(place, series, name)
                for name in held_out(series.evaluations)
                if not name.endswith("perplexity")  # the loss in other numbers
            },
            "differences": self._differences(place, series),
            "timeline": timeline.timeline(series, self._series),
            "modules": heat(series, len(self._series)),
        }

    def _points(self, place: int, series: Series, name: str) -> Points:
        evaluated = series.evaluations
        values = held_out(evaluated)[name]
        steps = _some([*values], len(self._series))
        low, high = evidence.bands([self._evidence.figures.get(_key(place, name, step)) for step in steps])
        for number, step in enumerate(steps):
            error = _error(evaluated[step], name)
            if np.isnan(low[number]) and error is not None:
                low[number], high[number] = values[step] - WITHIN * error, values[step] + WITHIN * error
        return _points(series, steps, [values[step] for step in steps], low, high)

    def _differences(self, place: int, series: Series) -> dict[str, Points]:
        """Of each checkpoint to the baseline, by the name of the figure."""
        keys = sorted(key for key in self._evidence.pairs if key.run == place)
        found = {}
        for name in dict.fromkeys(_name(key) for key in keys):
            own = _some([key for key in keys if _name(key) == name], len(self._series))
            pairs = [self._evidence.pairs[key] for key in own]
            ends = [pair.interval or (np.nan, np.nan) for pair in pairs]
            low, high = np.array(ends).T
            found[name] = _points(series, [key.step for key in own], [pair.difference for pair in pairs], low, high)
        return found


def _some(found: Sequence[Point], runs: int) -> list[Point]:
    """As many as a page of so many runs has room for, with the last one."""
    every = max(1, -(-len(found) // (MOST_POINTS // runs)))
    return [*reversed(found[::-every])]


def _key(place: int, name: str, step: int) -> Key:
    rows, _, metric = name.rpartition("/")
    return Key(place, rows or HELD_OUT, metric, step)


def _name(key: Key) -> str:
    return key.metric if key.set == HELD_OUT else f"{key.set}/{key.metric}"


def _error(metrics: Metrics, name: str) -> float | None:
    """The standard error of a figure that its evaluation recorded."""
    error = metrics.get(f"{name}_stderr")
    return float(error) if error is not None else None


def _points(series: Series, steps: Sequence[int], values: Sequence[float], low: np.ndarray, high: np.ndarray) -> Points:
    at = np.array(steps, dtype=np.int64)
    return {
        "steps": packed(at),
        "tokens": packed(series.steps.at("tokens", at)),
        "hours": packed(series.steps.at("hours", at)),
        "value": packed(values),
        "low": packed(low),
        "high": packed(high),
    }


def _given_up(series: Series, steps: np.ndarray, losses: np.ndarray) -> GivenUp:
    """On the other axes they stand where the steps that replaced them do."""
    places = {axis: packed(series.steps.at(axis, steps)) for axis in ("steps", "tokens", "hours")}
    return {"steps": places["steps"], "tokens": places["tokens"], "hours": places["hours"], "loss": packed(losses)}
