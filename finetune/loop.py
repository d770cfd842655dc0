"""Floor 3. The only backward and the only optimizer step. A generator: whoever iterates logs, saves, evaluates and stops.

`run.execute` is the everyday consumer. Order, schedule and seeds are functions of the step, so a loop that starts at
step 400 does what one that came from step 0 does.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune.data.batches import Batches
from finetune.errors import NotFiniteError
from finetune.order import derive
from finetune.plan import Plan
from finetune.state import TrainState

SUMMED_AT_ONCE = 1 << 20  # numbers: the sum of so many squares in fp32 is off by 1 in 10^6
EVALUATED_AT_ONCE = 64  # examples arranged together: enough to fill micro-batches well


class Wishes(NamedTuple):
    """What a rank wants at a step's edge; what all ranks then do is agreed by `agree`."""

    stop: bool = False
    save: bool = False
    renew: bool = False
    """The connections over which ranks report to saves are closed."""


@dataclass(frozen=True)
class StepReport:
    step: int
    loss: float
    """Mean nats a supervised token, over the whole step and all ranks."""
    grad_norm: float
    """2-norm of the gradient of that mean, before clipping."""
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float
    await_seconds: float
    """Of these, waiting for a snapshot to be copied."""
    examples: np.ndarray
    rows: np.ndarray
    """Row of each example, counted through the sources."""
    row_losses: list[float]
    """Mean nats a supervised token of each example."""
    row_tokens: list[int]
    """Supervised tokens of each example."""
    agreed: Wishes
    """What the ranks agreed on before this step."""


def steps(
    state: TrainState, plan: Plan, batches: Batches, until: int, wishes: Callable[[], Wishes]
) -> Iterator[StepReport]:
    """One report an update, up to step `until`, or until a rank wished to stop."""
    while state.step < until:
        agreed = agree(state.accelerator, wishes())
        if agreed.stop:
            return
        yield train_step(state, plan, batches, agreed)


NO_WISHES = Wishes()


def train_step(state: TrainState, plan: Plan, batches: Batches, agreed: Wishes = NO_WISHES) -> StepReport:
    """One update. Raises NotFiniteError, with the weights untouched, when loss or gradient norm is not a number."""
    started = time.perf_counter()
    accelerator, examples, step = state.accelerator, batches.examples, state.step + 1
    ids = plan.order.examples_of(step)
    total = int(examples.targets[ids].sum())
    row_sums = torch.zeros(len(ids), dtype=torch.float64, device=accelerator.device)
    micro_batches = batches.of(ids)
    # on a CPU, torch.manual_seed takes most of a millisecond: it writes down who called, for devices that are not there
    set_seed = torch.default_generator.manual_seed if accelerator.device.type == "cpu" else torch.manual_seed
    # ranks average their gradients: times their number makes it the sum over all rows, divided once by the step's weight
    weight = torch.full((), accelerator.num_processes / total, device=accelerator.device)
    for turn, micro_batch in enumerate(micro_batches.on(accelerator.device), 1):
        set_seed(derive(plan.recipe.train.seed, step, micro_batch.slot))
        is_last = turn == len(micro_batches) or accelerator.num_processes == 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(state.objective):
            loss_sum, rows = state.objective(micro_batch.inputs)
            accelerator.backward(loss_sum, gradient=torch.zeros_like(weight) if micro_batch.is_idle else weight)
        if not micro_batch.is_idle:
            row_sums.index_copy_(0, micro_batch.places, rows.detach().double())
    row_sums = accelerator.reduce(row_sums, "sum")
    norm = _grad_norm(state.trainable.values())
    *sums, grad_norm = torch.cat([row_sums, norm.detach().double().reshape(1)]).tolist()  # the one read of the device
    loss = math.fsum(sums) / total
    row_tokens = examples.targets[ids].tolist()
    row_losses = [row_sum / count for row_sum, count in zip(sums, row_tokens, strict=True)]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        state.optimizer.zero_grad()
        raise _not_finite(step, loss, grad_norm, examples.rows[ids], row_losses)
    await_seconds = state.await_snapshot()
    learning_rate = plan.learning_rate(step)
    update(state, learning_rate, grad_norm, plan.recipe.optimizer.max_grad_norm)
    state.step = step
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        tokens=int(examples.lengths[ids].sum()),
        supervised_tokens=total,
        seconds=time.perf_counter() - started,
        await_seconds=await_seconds,
        examples=ids,
        rows=examples.rows[ids],
        row_losses=row_losses,
        row_tokens=row_tokens,
        agreed=agreed,
    )


def update(state: TrainState, learning_rate: float, grad_norm: float, max_grad_norm: float) -> None:
    """Moves the weights by the gradients, scaled down to `max_grad_norm` where their norm is more, and forgets these.

    Fused optimizers scale while they read the gradients; a pass of its own, over as many bytes as the weights, is for the others.
    """
    optimizer = state.optimizer.optimizer  # inside Accelerate's
    excess = (grad_norm + 1e-6) / max_grad_norm  # the same small term as torch.nn.utils.clip_grad_norm_
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    gradients = [parameter.grad for parameter in state.trainable.values() if parameter.grad is not None]
    if excess > 1 and optimizer.defaults.get("fused") and not isinstance(gradients[0], DTensor):
        optimizer.grad_scale = torch.full((), excess, device=state.accelerator.device)
    elif excess > 1:
        torch._foreach_div_(gradients, excess)
    optimizer.step()  # not Accelerate's, which looks on the disk for a package at every step
    optimizer.grad_scale = None
    optimizer.zero_grad()


def _grad_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """2-norm of all gradients together, a scalar on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if all(type(each) is Tensor and each.device.type == "cpu" and each.dtype == torch.float32 for each in gradients):
        # torch's own norm is slower on a CPU, and of 28 million numbers off by 1 in 600
        pieces = [piece for each in gradients for piece in each.flatten().split(SUMMED_AT_ONCE)]
        return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum(dtype=torch.float64).sqrt()
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))  # also of bf16
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def evaluate(
    accelerator: Accelerator,
    objective: torch.nn.Module,
    batches: Batches,
    score: Callable,
    wishes: Callable[[], Wishes] = Wishes,
) -> dict[str, float] | None:
    """Figures over all examples of `batches`; streamed, nothing is gathered. None when a rank wished to stop.

    Leaves no trace in training: dropout is off and every training forward seeds itself.
    """
    examples = batches.examples
    sums: list[float] = []
    objective.eval()
    try:
        for first in range(0, len(examples), EVALUATED_AT_ONCE):
            if agree(accelerator, wishes()).stop:
                return None
            ids = np.arange(first, min(first + EVALUATED_AT_ONCE, len(examples)))
            row_sums = torch.zeros(len(ids), dtype=torch.float64, device=accelerator.device)
            for micro_batch in batches.of(ids).on(accelerator.device):
                with torch.inference_mode():
                    _, rows = objective(micro_batch.inputs)
                if not micro_batch.is_idle:
                    row_sums.index_copy_(0, micro_batch.places, rows.double())
            sums += accelerator.reduce(row_sums, "sum").tolist()
    finally:
        objective.train()
    return score(math.fsum(sums), int(examples.targets.sum()), len(examples))


def agree(accelerator: Accelerator, wishes: Wishes) -> Wishes:
    """What any rank wishes, all do."""
    if accelerator.num_processes == 1:
        return wishes
    counts = torch.tensor(wishes, dtype=torch.int32, device=accelerator.device)
    return Wishes(*(count > 0 for count in accelerator.reduce(counts, "sum").tolist()))


def _not_finite(step: int, loss: float, grad_norm: float, rows: np.ndarray, row_losses: list[float]) -> NotFiniteError:
    suspects = [int(row) for row, row_loss in zip(rows, row_losses, strict=True) if not math.isfinite(row_loss)]
    blamed = f"rows {suspects}" if suspects else f"one of rows {rows.tolist()}"
    return NotFiniteError(
        f"loss {loss:g} and gradient norm {grad_norm:g} are not finite, so the update was refused; {blamed}",
        where=f"step {step}",
        hint="look at those rows, lower optimizer.learning_rate, or use train.precision: fp32",
    )
