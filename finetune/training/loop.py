"""The only backward and the only optimizer step. A generator: its consumer logs, saves, evaluates and stops.

`run.execute` is the usual consumer. Order, schedule and seeds are functions of the step, so a loop from step 400 on does the
same as one from step 0.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.data.batches import Batches
from finetune.errors import DivergedError
from finetune.model.routing import Work
from finetune.plan.plan import Plan
from finetune.plan.row_order import derive
from finetune.recipe.schema import Guard
from finetune.store.run.records import Balance, StepFigures
from finetune.store.run.row_losses import Columns, ExpertLoad, ModuleNorms, RowLoss
from finetune.training import guard
from finetune.training.gradients import lacking
from finetune.training.state import TrainState


class Wishes(NamedTuple):
    """The wishes of a rank between two steps; `agree` makes them the wishes of all."""

    stop: bool = False
    save: bool = False
    renew: bool = False
    """The connections for the reports of saves are closed."""
    refused: bool = False
    """The last update was refused; every rank must have decided the same."""


# (step, {"loss": …, "grad_norm": …}) -> what to make of them, before the update
Judge = Callable[[int, dict[str, float]], guard.Verdict | None]


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
    """Seconds of these spent waiting for the copy of a snapshot."""
    examples: np.ndarray
    rows: np.ndarray
    """Row of each example, counted through the sources."""
    row_losses: list[float]
    """Mean nats a supervised token of each example."""
    row_tokens: list[int]
    """Supervised tokens of each example."""
    agreed: Wishes
    """The wishes agreed on before this step."""
    module_norms: dict[str, float]
    """2-norm of the gradient of each group of modules, before clipping."""
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    """By layer, how many tokens went to each expert."""
    without_gradient: tuple[str, ...] = ()
    """Trained tensors that got none; looked at once an attempt, in its first step."""
    router_loss: float | None = None
    """The balance of experts, if it is trained; `loss` is without it."""
    verdict: guard.Verdict | None = None
    """The guard's verdict, if something is wrong."""

    @property
    def figures(self) -> StepFigures:
        """The figures of a step in the journal. They must be the same when it runs again."""
        balance: Balance = {} if self.router_loss is None else {"router_loss": self.router_loss}
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            **balance,
        }

    @property
    def columns(self) -> Columns:
        """The record beside the journal: the loss of every row, and the gradient norm of every group of modules."""
        places = zip(self.examples.tolist(), self.rows.tolist(), self.row_losses, self.row_tokens, strict=True)
        rows = [RowLoss(self.step, *place) for place in places]
        load = [ExpertLoad(self.step, *each) for each in self.expert_tokens.items()]
        return Columns(rows, [ModuleNorms(self.step, self.module_norms)], load)

    @property
    def is_finished(self) -> bool:
        """Whether the state is now at this step, with its update or without (skipped). Else it is at the previous one."""
        return self.verdict is None or self.verdict.action in ("warn", "skip")


def stop_at_non_finite(step: int, figures: dict[str, float]) -> guard.Verdict | None:
    """The minimal guard: stops at NaN and infinity."""
    return guard.judge(Guard(spike="ignore"), step, figures, lambda quantity, before: (), ())


def steps(
    state: TrainState,
    plan: Plan,
    batches: Batches,
    until: int,
    wishes: Callable[[], Wishes],
    judge: Judge = stop_at_non_finite,
) -> Iterator[StepReport]:
    """One report an update, up to step `until`, or until a rank wishes to stop. After a report of an unfinished step, the caller
    must end or move the state."""
    is_refused = False
    while state.step < until:
        # One small reduce a step: a signal reaches one rank, and all must stop at the same step.
        agreed = agree(state.accelerator, wishes()._replace(refused=is_refused), state.step)
        if agreed.stop:
            return
        report = train_step(state, plan, batches, agreed, judge)
        is_refused = report.verdict is not None and report.verdict.is_refused
        yield report


NO_WISHES = Wishes()


def train_step(
    state: TrainState, plan: Plan, batches: Batches, agreed: Wishes = NO_WISHES, judge: Judge = stop_at_non_finite
) -> StepReport:
    """One update, unless `judge` refuses it: then the weights stay as they are."""
    started = time.perf_counter()
    examples, step = batches.examples, state.step + 1
    # A function of the step alone, so a resumed run needs no state of a data loader.
    ids = plan.examples_of(step)
    total = int(examples.targets[ids].sum())
    summed = _backward(state, plan, batches, ids, total)
    idle = () if state.is_begun else lacking(state)
    norms = state.strategy.gradient_norms(state)
    total_norm = torch.linalg.vector_norm(norms).reshape(1)
    read = torch.cat([norms, total_norm, summed]).tolist()  # the one read of the device
    of_modules, (grad_norm, *others) = read[: len(norms)], read[len(norms) :]
    sums, routed, routers = others[: len(ids)], others[len(ids) :], state.routers
    loss = math.fsum(sums) / total
    # Before the update: a NaN that reaches the weights stays there.
    verdict = judge(step, {"loss": loss, "grad_norm": grad_norm})
    learning_rate, await_seconds = plan.learning_rate(step), 0.0
    if verdict and verdict.is_refused:
        state.optimizer.zero_grad()
    else:
        # A save may still be copying the weights of the last step.
        await_seconds = state.await_snapshot()
        update(state, learning_rate, grad_norm, plan.recipe.optimizer.max_grad_norm)
        if state.average:
            state.average.update(step)
    row_tokens = examples.targets[ids].tolist()
    report = StepReport(
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
        row_losses=[row_sum / count for row_sum, count in zip(sums, row_tokens, strict=True)],
        row_tokens=row_tokens,
        agreed=agreed,
        module_norms=dict(zip(state.modules, of_modules, strict=True)),
        expert_tokens=routers.load(routed) if routers else {},
        router_loss=routers.balance_of(routed) if routers else None,
        without_gradient=idle,
        verdict=verdict,
    )
    state.is_begun = True
    if report.is_finished:
        state.step = step
    return report


def _backward(state: TrainState, plan: Plan, batches: Batches, ids: np.ndarray, total: int) -> Tensor:
    """Gradients of the mean loss over the `total` supervised tokens of a step, on every rank; returns the summed loss of each of its
    examples, and the figures of routers, fp64 (N + ...,)."""
    accelerator, step, slot_sums = state.accelerator, state.step + 1, state.slot_sums
    # In fp64, so that the sum does not depend on how rows are spread over micro-batches and ranks.
    row_sums = torch.zeros(len(ids), dtype=torch.float64, device=accelerator.device)
    micro_batches = batches.of(ids)
    # on a CPU, torch.manual_seed takes most of a millisecond: it writes down who called, for devices that are not there
    set_seed = torch.default_generator.manual_seed if accelerator.device.type == "cpu" else torch.manual_seed
    # divided once, by the step's weight; where ranks average their gradients, times their number makes it the sum over all rows
    ranks = 1 if state.strategy.is_sharded or slot_sums else accelerator.num_processes
    weight = torch.full((), ranks / total, device=accelerator.device)
    lengths = batches.examples.lengths[ids]
    for turn, micro_batch in enumerate(micro_batches.on(accelerator.device), 1):
        # By step and slot: dropout is the same wherever and how often this micro-batch runs.
        set_seed(derive(plan.recipe.train.seed, step, micro_batch.slot))
        # Ranks exchange gradients once a step, with the last micro-batch; `slot_sums` exchanges them itself.
        is_exchanged = accelerator.num_processes == 1 or (turn == len(micro_batches) and not slot_sums)
        with contextlib.nullcontext() if is_exchanged else accelerator.no_sync(state.objective):
            own = lengths[micro_batch.indices].tolist()
            work = Work(own, sum(own) / float(lengths.sum()), total, is_counted=not micro_batch.is_idle)
            loss_sum, rows = state.objective(micro_batch.inputs, *([work] if state.routers else []))
            # A rank with nothing left still runs: collectives wait for every rank. Its weight is zero.
            accelerator.backward(loss_sum, gradient=torch.zeros_like(weight) if micro_batch.is_idle else weight)
        if slot_sums:
            slot_sums.add(micro_batch.is_idle)
        if not micro_batch.is_idle:
            row_sums.index_copy_(0, micro_batch.places, rows.detach().double())
    if slot_sums:
        slot_sums.finish()
    figures = torch.cat([row_sums, state.routers.take()]) if state.routers else row_sums
    return accelerator.reduce(figures, "sum")


def update(state: TrainState, learning_rate: float, grad_norm: float, max_grad_norm: float) -> None:
    """Updates the weights by the gradients, clipped to a norm of `max_grad_norm`, and clears the gradients."""
    optimizer = state.optimizer.optimizer  # inside Accelerate's
    excess = (grad_norm + 1e-6) / max_grad_norm  # the same small term as torch.nn.utils.clip_grad_norm_
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if excess > 1:
        state.strategy.clip(state, excess)
    # Not Accelerate's step, which looks on the disk for a package every time.
    optimizer.step()
    optimizer.grad_scale = None
    optimizer.zero_grad()


def agree(accelerator: Accelerator, wishes: Wishes, step: int = 0) -> Wishes:
    """The wishes of any rank, for all. DivergedError if only some of them refused the update of a step: their weights differ."""
    if accelerator.num_processes == 1:
        return wishes
    counts = torch.tensor(wishes, dtype=torch.int32, device=accelerator.device)
    counts = accelerator.reduce(counts, "sum").tolist()
    if 0 < Wishes(*counts).refused < accelerator.num_processes:
        hint = "run the same command again; it resumes from the last commit"
        raise DivergedError("some ranks refused the update, and others made it", where=f"step {step}", hint=hint)
    return Wishes(*(count > 0 for count in counts))
