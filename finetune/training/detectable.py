"""What difference the held-out rows of a plan can show: from the rows of an earlier run, or before there is one, from a usual range."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from finetune.plan.statistics import power
from finetune.plan.statistics.judge import FEWEST_UNITS
from finetune.plan.statistics.sample import Sample
from finetune.store import evaluations
from finetune.store.evaluations import HELD_OUT, Evaluation
from finetune.store.run.directory import RunDirectory, step_of
from finetune.training.resolve import Resolved


class Detectable(TypedDict):
    """The smallest difference of held-out losses, in nats, that is found in four of five comparisons of two models."""

    low: float
    high: float
    """As `low` where it is known from a run."""
    known_from: str | None
    """The two evaluations that the figure comes from; None for a usual range."""


class _Spread(NamedTuple):
    """How much the difference of two models varies from row to row, in nats a token."""

    value: float
    known_from: str


def detectable(resolved: Resolved, run: Path) -> Detectable | None:
    """Of the held-out rows; None where there are too few to show anything."""
    numbers, places = np.unique(resolved.holdout.rows, return_inverse=True)
    tokens = np.bincount(places, resolved.holdout.targets, len(numbers))
    tokens = tokens[tokens > 0]
    if len(tokens) < FEWEST_UNITS:
        return None
    found = _known(resolved.held_out.says, run)
    low, high = (found.value, found.value) if found else power.USUAL_SPREADS
    smallest = [power.smallest(power.error_of(spread, tokens), len(tokens) - 1) for spread in (low, high)]
    return {"low": smallest[0], "high": smallest[1], "known_from": found.known_from if found else None}


def line(facts: Detectable, rows: int) -> str:
    """The same for a reader."""
    if facts["known_from"]:
        return (
            f"{rows:,} held-out rows can show a difference of about {facts['low']:.2g} nats (by {facts['known_from']})"
        )
    between = f"{facts['low']:.2g} to {facts['high']:.2g} nats"
    return f"{rows:,} held-out rows can usually show a difference of {between}; the first run on them tells"


def _known(contents: np.ndarray, run: Path) -> _Spread | None:
    """By the newest evaluations of the run itself, or else of the runs beside it, that are about most of these rows."""
    beside = [each for each in RunDirectory(run).neighbours() if each.name != run.name]
    found: list[tuple[str, Evaluation]] = []
    for each in (run, *beside):
        found += _held_out(each, contents, found[0][1].about["data"] if found else None)
        if len(found) >= 2:
            (later, one), (earlier, other) = found[:2]
            spread = spread_of(one, other) if np.array_equal(one.contents, other.contents) else 0.0
            return _Spread(spread, f"the rows of {earlier} and {later}") if 0 < spread < np.inf else None
    return None


def _held_out(run: Path, contents: np.ndarray, data: str | None) -> Iterator[tuple[str, Evaluation]]:
    """The two newest evaluations of trained steps; none if the newest step was evaluated on other rows."""
    folders = RunDirectory(run).evaluations.glob("*")
    steps = sorted((step for folder in folders if (step := step_of(folder.name))), reverse=True)
    for step in steps[:2]:
        for each in reversed(evaluations.read_all(evaluations.of_step(run, step))):
            is_like = each.about["set"] == HELD_OUT and "loss" in each.columns and data in (None, each.about["data"])
            if is_like and np.isin(each.contents, contents).mean() > 0.5:
                data = each.about["data"]
                yield f"{run.name}@{step}", each
                break
        else:  # there may be hundreds of other runs
            return


def spread_of(one: Evaluation, other: Evaluation) -> float:
    """How much their losses a token differ from row to row beyond their difference; the rows are in one order."""
    weights = one.tokens.astype(np.float64)
    sample = Sample((one.columns["loss"] - other.columns["loss"])[None], weights)
    return power.spread_of(float(sample.errors[0]), weights)
