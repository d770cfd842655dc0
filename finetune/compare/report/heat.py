"""The gradient norm of each group of modules, in a few columns over the steps of a run."""

from typing import TypedDict

import numpy as np

from finetune.compare.report.buckets import Packed, packed, places_of
from finetune.compare.series import Series
from finetune.store.run import parts
from finetune.store.run.directory import RunDirectory
from finetune.store.run.journal import is_rollback

COLUMNS = 160
MOST = 60_000
"""Numbers of all runs together."""


class Heat(TypedDict):
    modules: list[str]
    first: Packed
    """The first step of each column."""
    steps: Packed
    """The last one; also on the other axes."""
    tokens: Packed
    hours: Packed
    norms: Packed
    """The largest norm of each module (rows) in each column; float32."""


def heat(series: Series, runs: int) -> Heat | None:
    """One of so many runs; None if no norm is recorded."""
    for _ in range(3):
        try:
            return _heat(series, MOST // runs)
        except FileNotFoundError:  # a training merged it meanwhile
            continue
    return None


def _heat(series: Series, most: int) -> Heat | None:
    if not len(series.steps.step):
        return None
    rollbacks = [event for event in series.events if is_rollback(event)]
    first, last = int(series.steps.step[0]), int(series.steps.step[-1])
    width = -(-(last - first + 1) // COLUMNS)
    count = -(-(last - first + 1) // width)
    found: dict[str, np.ndarray] = {}
    reader = parts.Reader(RunDirectory(series.run).modules, lambda: rollbacks)
    for steps, columns in reader.whole(first, last):
        for name, norms in columns.items():
            row = found.setdefault(name, np.full(count, np.nan))
            np.fmax.at(row, (steps - first) // width, np.where(np.isfinite(norms), norms, np.nan))
    if not found:
        return None
    names = sorted(found, key=_natural)
    norms = np.array([found[name] for name in names], dtype=np.float64)
    together = -(-norms.size // most)
    norms = np.pad(norms, ((0, 0), (0, -count % together)), constant_values=np.nan)
    norms = np.fmax.reduce(norms.reshape(len(names), -1, together), axis=2)
    starts = first + width * together * np.arange(norms.shape[1])
    ends = np.minimum(starts + width * together - 1, last)
    places = np.searchsorted(series.steps.step, ends, side="right") - 1
    return {
        "modules": names,
        "first": packed(starts),
        **places_of(series.steps, places),
        "norms": packed(norms, "<f4"),
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """`layers.9` comes before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
