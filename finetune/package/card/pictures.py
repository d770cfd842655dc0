"""Plots over steps as PNG, of a card and beside a report. The same numbers give the same bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Drawn:
    """A line, or points with an interval of each."""

    label: str
    steps: Numbers
    values: Numbers
    color: str
    low: Numbers = ()
    high: Numbers = ()
    are_points: bool = False


def plot(drawn: Sequence[Drawn], title: str, unit: str) -> bytes:
    """A PNG of lines and points over steps."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"backend": matplotlib.rcParams["backend"]}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for each in drawn:
            if each.are_points:
                axes.plot(each.steps, each.values, color=each.color, marker="o", label=each.label)
            else:
                axes.plot(each.steps, each.values, color=each.color, linewidth=0.8, alpha=0.7, label=each.label)
            if len(each.low):
                axes.fill_between(each.steps, each.low, each.high, color=each.color, alpha=0.2, linewidth=0)
        axes.set(xlabel="step (optimizer updates)", ylabel=unit, title=title)
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})  # else bytes hold the version
    return stream.getvalue()
