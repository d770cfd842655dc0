"""`finetune curves`: the figures of runs as text, also while they train. Never imports torch."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from finetune.compare.series import HELD_OUT, Axis, Series, held_out, is_held_out, names_of, smoothed
from finetune.compare.terminal import COLORS, SIGNS, Line, Look, number, panel, printable
from finetune.errors import FinetuneError, counted

USUAL = ("loss", "learning_rate", "grad_norm")
SAME_SCALE = "perplexity"  # the held-out loss in other numbers
TITLES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens": "tokens of a step",
    "seconds": "seconds of a step",
    "tokens_per_second": "tokens a second",
    "memory_bytes": "memory in bytes",
    "router_loss": "balance of experts",
}
TWO_COLUMNS = 120
"""From this width on, two panels stand side by side."""
GAP = 3


@dataclass(frozen=True)
class Screen:
    """Where curves are drawn. `rows` is None where they may take as many as they like."""

    columns: int
    rows: int | None
    is_ascii: bool
    is_colored: bool


@dataclass(frozen=True)
class Choice:
    """What is drawn."""

    metrics: tuple[str, ...] = ()
    """None: the usual ones."""
    axis: Axis = "steps"
    smooth: int | None = None
    """Steps in a mean. None: 1 in 50 where there are more steps than columns of dots."""


def open_series(runs: Sequence[Path]) -> list[Series]:
    """Each run once, read as far as it goes."""
    found = [Series(run) for run in dict.fromkeys(runs)]
    for each in found:
        each.update()
    return found


def curves(series: Sequence[Series], choice: Choice, screen: Screen) -> str:
    """A panel for each metric, then a line for each run."""
    metrics = _chosen(series, choice.metrics)
    side_by_side = 2 if screen.columns >= TWO_COLUMNS and len(metrics) > 1 else 1
    bands = math.ceil(len(metrics) / side_by_side)
    height = 12 if screen.rows is None else max(3, (screen.rows - len(series) - 2) // bands - 4)
    width = (screen.columns - GAP * (side_by_side - 1)) // side_by_side
    has_signs = len(series) > (1 if screen.is_ascii or not screen.is_colored else len(COLORS))
    look = Look(max(24, width), height, screen.is_ascii, screen.is_colored, has_signs)
    most = max(len(each.steps.step) for each in series)
    smooth = choice.smooth or (1 if most <= 2 * look.width else _round(most / 50))
    panels = [
        panel(_title(metric, series, smooth), _lines(metric, series, choice.axis, smooth), look, choice.axis)
        for metric in metrics
    ]
    rows: list[str] = []
    for first in range(0, len(panels), side_by_side):
        some = panels[first : first + side_by_side]
        beside = zip_longest(*some, fillvalue=" " * look.width)  # a title may take two rows
        rows += ["", *((" " * GAP).join(parts).rstrip() for parts in beside)]
    rows += ["", *(_status(each, place, look) for place, each in enumerate(series)), *_notes(series)]
    return "\n".join(rows[1:])


def _chosen(series: Sequence[Series], metrics: tuple[str, ...]) -> list[str]:
    known = [*names_of(series)]
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none yet'}"
            raise FinetuneError(f"no run has recorded `{name}`", where="--metric", hint=hint)
    others = [
        name for name in known if is_held_out(name) and name != f"{HELD_OUT}loss" and not name.endswith(SAME_SCALE)
    ]
    return list(metrics) or [USUAL[0], *others, *USUAL[1:]]


def _round(count: float) -> int:
    """1, 2 or 5 times a power of ten, at most `count`."""
    power = 10 ** math.floor(math.log10(count))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= count)


def _title(metric: str, series: Sequence[Series], smooth: int) -> str:
    """With what a mean hides."""
    if is_held_out(metric):
        return f"held-out {metric.removeprefix(HELD_OUT)}"
    name = TITLES[metric]
    if metric == "loss" and any(each.evaluations for each in series):
        name += "; points: held-out loss"
    if smooth == 1 or metric == "learning_rate":
        return name
    values = np.concatenate([each.steps.figure(metric) for each in series])
    steps = np.concatenate([each.steps.step for each in series])
    finite = np.isfinite(values)
    highest = int(np.argmax(np.where(finite, values, -np.inf)))
    return (
        f"{name}; means of {smooth:,} steps, highest {number(float(values[highest]))} at step {int(steps[highest]):,}"
    )


def _lines(metric: str, series: Sequence[Series], axis: Axis, smooth: int) -> list[Line]:
    found = []
    for style, each in enumerate(series):
        steps = each.steps
        if not is_held_out(metric):
            values = steps.figure(metric)
            found.append(
                Line(steps.along(axis), values if metric == "learning_rate" else smoothed(values, smooth), style)
            )
        if metric == "loss" or is_held_out(metric):
            points = held_out(each.evaluations).get(metric.removeprefix(HELD_OUT), {})
            x, y = steps.at(axis, np.array([*points], dtype=np.int64)), np.array([*points.values()])
            found += [Line(x, y, style)] if metric != "loss" else []
            found.append(Line(x, y, style, are_points=True))
    return found


def _status(series: Series, style: int, look: Look) -> str:
    """Where a run is."""
    steps, marked = series.steps, f"{look.mark(style)} {printable(str(series.run))}"
    if not len(steps.step):
        return f"{marked}  no step of {series.plan.steps:,} yet"
    facts = [f"step {steps.step[-1]:,} of {series.plan.steps:,}", f"loss {steps.figures['loss'][-1]:.4f}"]
    facts += [
        f"held-out {float(figures['loss']):.4f} at step {step:,}"
        for step, figures in [*series.evaluations.items()][-1:]
    ]
    speed = float(np.nansum(steps.figures["tokens"][-50:]) / max(np.nansum(steps.figures["seconds"][-50:]), 1e-9))
    facts += [f"{number(float(steps.tokens[-1]))} tokens", f"{number(float(f'{speed:.3g}'))} tokens/s"]
    return f"{marked}  {'  '.join(facts)}"


def _notes(series: Sequence[Series]) -> list[str]:
    """What the lines do not show."""
    notes = []
    for each in series:
        name = printable(str(each.run))
        bad = int((~np.isfinite(each.steps.figures["loss"])).sum())
        notes += [f"{name}: the loss of {counted(bad, 'step')} is not finite"] if bad else []
        lost = sum(len(steps.step) for steps in each.given_up)
        notes += [f"{name}: {counted(lost, 'step')} given up by rollbacks, not drawn"] if lost else []
    if len(series) > len(SIGNS):
        notes.append(f"{len(SIGNS)} styles for {len(series)} runs: some share one")
    return notes
