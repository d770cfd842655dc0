"""What is wrong with a step that was refused: its rows, or the weights that they met. `run` says it."""

import math

import torch

from finetune.errors import NotFiniteError, counted
from finetune.model import shards
from finetune.training.guard import Verdict
from finetune.training.loop import StepReport
from finetune.training.state import TrainState

WRAPPERS = ("base_model.model.", ".base_layer")  # what an adapter puts into the names of its base


def broken(state: TrainState) -> NotFiniteError | None:
    """The error where a weight is NaN or infinite: no update can be made with it, and no row is to blame."""
    for name, parameter in state.model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(shards.local(parameter.detach())).all():
            plain = name.replace(WRAPPERS[0], "").replace(WRAPPERS[1], "")
            # Training never writes a frozen weight, so a broken one was broken before.
            if state.step == 0 or not parameter.requires_grad:
                hint = "no row is to blame: download the base again, or name another revision or base"
                return NotFiniteError(f"the base is broken: its tensor {plain} has NaN or infinite values", hint=hint)
            hint = "go on from an earlier step with a lower learning rate: `finetune branch RUN@STEP --set optimizer.learning_rate=…`"
            return NotFiniteError(f"the weights after step {state.step} are broken: {plain} is not finite", hint=hint)
    return None


def refusal(report: StepReport, verdict: Verdict) -> str:
    """What is wrong with a step, and with which rows."""
    if verdict.reason == "spike":
        worst = max(range(len(report.rows)), key=report.row_losses.__getitem__)
        about = f"row {report.rows[worst]} has the highest loss, {report.row_losses[worst]:.4g}"
        return f"{verdict.message}, so the update was refused; {about}"
    bad = [row for row, loss in zip(report.rows.tolist(), report.row_losses, strict=True) if not math.isfinite(loss)]
    # The backward pass can overflow although every loss is finite. Then no single row is known.
    rows = f"rows {bad}" if bad else f"one of rows {report.rows.tolist()}"
    # Step 1 still has the weights of the base.
    if report.step == 1 and len(bad) == len(report.rows) > 1:
        rows = f"the base gives no finite loss for any of its {counted(len(bad), 'row')}, so the base is to blame, or train.precision"
    figures = f"loss {report.loss:g} and gradient norm {report.grad_norm:g}"
    return f"{figures} are not finite, so the update was refused; {rows}"
