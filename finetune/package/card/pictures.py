"""Plots over steps as PNG, of a card and beside a report. The same numbers give the same bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Numbers = Sequence[float] | np.ndarray
FEW = 4
"""As many lines and points have room for a legend among them, and for bands; more have their legend beside them, and no bands."""


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
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"backend": matplotlib.rcParams["backend"]}):
        are_few = len(drawn) <= FEW
        figure = Figure(figsize=(7, 4) if are_few else (10, 5), layout="constrained")
        axes = figure.subplots()
        for each in drawn:
            if each.are_points:
                axes.plot(each.steps, each.values, color=each.color, marker="o", label=each.label)
            else:
                alpha = 0.7 if are_few else 0.3
                axes.plot(each.steps, each.values, color=each.color, linewidth=0.8, alpha=alpha, label=each.label)
            if len(each.low) and are_few:
                axes.fill_between(each.steps, each.low, each.high, color=each.color, alpha=0.2, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.set(xlabel="step (optimizer updates)", ylabel=unit, title=title)
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend() if are_few else axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})  # else bytes hold the version
    return stream.getvalue()
