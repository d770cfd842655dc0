"""The names of held-out figures: `loss` is of the held-out rows, `docs/loss` of the evaluation set `docs`."""

from finetune.plan.facts import Metrics
from finetune.recipe.schema import HELD_OUT


def named(rows: str, metrics: Metrics) -> Metrics:
    """The figures of a set of rows, by the names that they have among those of all sets."""
    prefix = "" if rows == HELD_OUT else f"{rows}/"
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def tracked(metrics: Metrics) -> Metrics:
    """The same for trackers, which have the figures of training beside them."""
    return {name if "/" in name else f"held_out_{name}": value for name, value in metrics.items()}


def told(step: int, metrics: Metrics) -> str:
    """A line about an evaluation."""
    shown = ("/loss", "ema_loss")
    others = "".join(f", {name} {value:.4f}" for name, value in metrics.items() if name.endswith(shown))
    return f"held-out loss at step {step}: {metrics['loss']:.4f}{others}"
