"""Shares of blame of the rows of a step; they add up to 1.

Of a loss: the row's part of the excess over the step's median. Of an update: g_i . g / |g|^2, with g the gradient of the step and g_i
that of one row (first-order influence, as in TracIn, arXiv 2002.08484). Dropout is off: a row alone would have other masks.
"""

import statistics

import numpy as np
import torch

from finetune.data.batches import Batch, Batches, each_tensor
from finetune.plan.plan import Plan
from finetune.training.loop import StepReport
from finetune.training.state import TrainState

LEAST = "row_loss_min"
NOT_OF_ROWS = ("learning_rate", "seconds", "await_seconds", "memory_bytes")


def loss_shares(report: StepReport) -> dict[int, float]:
    """By example. NaN and infinite rows have the whole share, in equal parts."""
    losses = dict(zip(report.examples.tolist(), report.row_losses, strict=True))
    bad = [example for example, loss in losses.items() if not np.isfinite(loss)]
    if bad:
        return {example: 1 / len(bad) if example in bad else 0.0 for example in losses}
    usual = statistics.median(losses.values())
    tokens = dict(zip(report.examples.tolist(), report.row_tokens, strict=True))
    excess = {example: max(0.0, loss - usual) * tokens[example] for example, loss in losses.items()}
    total = sum(excess.values())
    return {example: value / total if total else 1 / len(excess) for example, value in excess.items()}


def shares_of(quantity: str, report: StepReport) -> dict[int, float]:
    """By example, of a recorded quantity: token counts by tokens, the least loss to its row, all else as a loss."""
    examples = report.examples.tolist()
    if quantity in NOT_OF_ROWS:
        return {}
    if quantity in ("tokens", "supervised_tokens"):
        tokens = report.row_tokens
        return {example: count / sum(tokens) for example, count in zip(examples, tokens, strict=True)}
    if quantity == LEAST:
        least = min(report.row_losses)
        places = [loss == least for loss in report.row_losses]
        return {example: place / sum(places) for example, place in zip(examples, places, strict=True)}
    return loss_shares(report)


def gradient_shares(state: TrainState, plan: Plan, batches: Batches, step: int) -> dict[int, float]:
    """By example, at the current state. Every row runs alone, twice: for the sum, and for its part in it."""
    ids = plan.examples_of(step)
    total = _gradient(state, batches, ids)
    square = sum(float(part.double().square().sum()) for part in total)
    shares = {}
    for example in ids.tolist():
        own = _gradient(state, batches, np.array([example]))
        product = sum(float((one.double() * two.double()).sum()) for one, two in zip(own, total, strict=True))
        shares[example] = product / square if square else 1 / len(ids)
    return shares


def row_losses(state: TrainState, batches: Batches, ids: np.ndarray) -> list[float]:
    """Mean nats of the supervised tokens of each example, at the current state."""
    objective = state.accelerator.unwrap_model(state.objective).eval()
    found = []
    for example in ids.tolist():
        with torch.inference_mode():
            total, _ = objective(_alone(state, batches, example))
        found.append(float(total) / int(batches.examples.targets[example]))
    objective.train()
    return found


def _gradient(state: TrainState, batches: Batches, ids: np.ndarray) -> list[torch.Tensor]:
    """Gradients of the summed loss of examples, by trainable parameter; leaves the parameters' own gradients alone."""
    objective = state.accelerator.unwrap_model(state.objective).eval()
    parameters = list(state.trainable.values())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for example in ids.tolist():
        total, _ = objective(_alone(state, batches, example))
        for summed, grad in zip(sums, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
            if grad is not None:
                summed += grad
    objective.train()
    return sums


def _alone(state: TrainState, batches: Batches, example: int) -> Batch:
    device = state.accelerator.device
    return each_tensor(batches.collate([batches.examples[example]]), lambda tensor: tensor.to(device))
