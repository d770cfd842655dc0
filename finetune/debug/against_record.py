"""Compares a step that ran again with its record, and a state with its checkpoint, to the bit."""

from dataclasses import dataclass

import torch

from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.run import journal
from finetune.store.run.records import EventRecord, StepRecord
from finetune.store.run.row_losses import Reader
from finetune.training.loop import StepReport
from finetune.training.saving import reading, snapshot
from finetune.training.state import TrainState


@dataclass(frozen=True)
class Difference:
    """A difference from the record; values as in the journal."""

    step: int
    quantity: str
    recorded: object
    replayed: object

    def __str__(self) -> str:
        return f"step {self.step}: {self.quantity} was {self.recorded!r} and is {self.replayed!r}"


def of_step(report: StepReport, record: StepRecord | EventRecord, columns: Reader) -> Difference | None:
    """The first quantity that differs from the step's record, or from that of its refusal: figures, row losses, gradient norms."""
    step = report.step
    now: dict[str, object] = {**report.figures}
    if report.verdict and record["kind"] == "step":
        now["skipped"] = report.verdict.reason
    then = {name: record.get(name) for name in {**now, **({"skipped": 0} if "skipped" in record else {})}}
    if quantity := journal.difference(then, now):
        return Difference(step, quantity, then.get(quantity), now.get(quantity))
    for one, two in zip(columns.rows(step), report.columns.rows, strict=False):
        if repr(one) != repr(two):
            now_loss = two.loss if one.row == two.row else f"row {two.row}"
            return Difference(step, f"loss of row {one.row}", one.loss, now_loss)
    for name, norm in columns.modules(step).items():
        if repr(norm) != repr(report.module_norms.get(name)):
            return Difference(step, f"gradient norm of {name}", norm, report.module_norms.get(name))
    return None


def of_tensors(state: TrainState, checkpoint: Checkpoint) -> Difference | None:
    """The first tensor that differs from the checkpoint of the state's step; None also where that is not a full one."""
    if checkpoint.manifest.kind != "full":
        return None
    live = snapshot.Live(state)
    tensors, _ = live.copied()
    stored = reading.stored_tensors(checkpoint)

    def is_stored(name: str) -> bool:
        own, whole = live.rows.get(name), stored.get(name)
        then = whole[own.first : own.end] if own and whole is not None else whole
        return then is not None and torch.equal(_bits(tensors[name].detach().cpu()), _bits(then))

    names = list(tensors)
    place = next((place for place, name in enumerate(names) if not is_stored(name)), len(names))
    if state.strategy.is_sharded:  # each rank has compared what it holds, and all have to know of the first difference
        place = int(state.accelerator.gather(torch.tensor([place], device=state.accelerator.device)).min())
    return Difference(state.step, f"tensor {names[place]}", "as stored", "another") if place < len(names) else None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
