"""The tables of a report: the runs side by side, and the recipe keys in which they differ. Every cell is text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypedDict

import numpy as np

from finetune.compare.report.evidence import Evidence, Key
from finetune.compare.series import Series, held_out
from finetune.errors import counted
from finetune.plan.disk import readable
from finetune.plan.plan import are_same_rows
from finetune.plan.statistics.judge import Interval
from finetune.store.evaluations import HELD_OUT

RECENT = 50  # steps whose mean is shown


class Table(TypedDict):
    head: list[str]
    rows: list[list[str]]


def comparison(series: Sequence[Series], evidence: Evidence) -> Table:
    """A row for each run."""
    found = dict.fromkeys(name for each in series for name in held_out(each.evaluations))
    names = [name for name in found if not name.endswith("perplexity")]  # the loss in other numbers
    others = [name for name in names if name != "loss"]
    baseline = evidence.baselines.get(HELD_OUT)
    head = ["run", "steps", f"training loss, last {RECENT} steps", "held-out loss", "lowest"]
    head += [f"difference to {baseline}"] if baseline else []
    head += [*(f"held-out {name}" for name in others), "tokens", "time in steps", "tokens/s", "memory", "task"]
    rows = [_row(place, each, others, evidence) for place, each in enumerate(series)]
    return {"head": head, "rows": rows}


def _row(place: int, series: Series, others: Sequence[str], evidence: Evidence) -> list[str]:
    steps, evaluated = series.steps, held_out(series.evaluations)
    losses = steps.figures["loss"][-RECENT:]
    finite = losses[np.isfinite(losses)]
    tokens, seconds = (float(np.nansum(steps.figures[name])) for name in ("tokens", "seconds"))
    memory = steps.figures["memory_bytes"]
    by_step = evaluated.get("loss", {})
    lowest = min((step for step in by_step if np.isfinite(by_step[step])), key=lambda step: by_step[step], default=None)
    return [
        str(series.run),
        f"{int(steps.step[-1]) if len(steps.step) else 0:,} of {series.plan.steps:,}",
        f"{finite.mean():.4f}" if len(finite) else "",
        _last(place, "loss", by_step, evidence),
        f"{by_step[lowest]:.4f} at step {lowest:,}" if lowest is not None else "",
        *([_difference(place, by_step, evidence)] if HELD_OUT in evidence.baselines else []),
        *(_last(place, name, evaluated.get(name, {}), evidence) for name in others),
        f"{int(tokens):,}",
        str(timedelta(seconds=round(seconds))),
        f"{tokens / seconds:,.0f}" if seconds else "",
        readable(int(np.nanmax(memory))) if np.isfinite(memory).any() else "not recorded",
        series.plan.recipe.task.name,
    ]


def _last(place: int, name: str, values: Mapping[int, float], evidence: Evidence) -> str:
    """The last held-out figure with its interval."""
    if not values:
        return ""
    step = max(values)
    rows, _, metric = name.rpartition("/")
    figure = evidence.figures.get(Key(place, rows or HELD_OUT, metric, step))
    return f"{values[step]:.4f}" + (f" {_interval(figure.interval)}" if figure and figure.interval else "")


def _difference(place: int, values: Mapping[int, float], evidence: Evidence) -> str:
    pair = evidence.pairs.get(Key(place, HELD_OUT, "loss", max(values))) if values else None
    if pair is None:
        return ""
    interval = f" {_interval(pair.interval)}" if pair.interval else ""
    return f"{pair.difference:+.4f}{interval}" + (f", {pair.verdict}" if pair.verdict else "")


def _interval(ends: Interval) -> str:
    return f"({ends[0]:.4f} to {ends[1]:.4f})"


def notes(series: Sequence[Series]) -> list[str]:
    """What a reader of the table and the charts has to know."""
    first, found = series[0], []
    others = [str(each.run) for each in series if not are_same_rows(each.plan, first.plan)]
    if others:
        have = "have" if len(others) > 1 else "has"
        found.append(
            f"{', '.join(others)} {have} other held-out rows than {first.run}: their held-out figures are no comparison."
        )
    for each in series:
        bad = int((~np.isfinite(each.steps.figures["loss"])).sum())
        found += (
            [f"{each.run}: the loss of {counted(bad, 'step')} is NaN or infinite, a gap in the line."] if bad else []
        )
    return found


def recipe_differences(series: Sequence[Series]) -> Table:
    """A row for each key that two of the recipes have otherwise."""
    flat = [dict(_flat(each.plan.recipe.model_dump(mode="json"))) for each in series]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    differing = [key for key in keys if len({recipe.get(key, "") for recipe in flat}) > 1]
    return {
        "head": ["key", *(str(each.run) for each in series)],
        "rows": [[key, *(recipe.get(key, "") for recipe in flat)] for key in differing],
    }


def _flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a recipe by its dotted key, as JSON."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{place}]")
    else:
        yield key, json.dumps(value, ensure_ascii=False)
