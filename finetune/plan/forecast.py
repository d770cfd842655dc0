"""The forecast of a plan: its rows, steps, memory and disk. Formulas; it must measure nothing."""

from pathlib import Path
from typing import cast

from finetune.plan import cadence, memory
from finetune.plan.disk import checkpoint_bytes, free_bytes, run_bytes
from finetune.plan.memory import Device, Work
from finetune.plan.pace import mean_tokens
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape
from finetune.plan.shown import BaseFacts, Forecast, OfDevices, SourceFacts, Target
from finetune.recipe.schema import Publish

DEVICES = (1, 2, 4, 8, 16, 32, 64)
CARD_BYTES = 80 * 2**30  # of a GPU, if this machine has none


def forecast(plan: Plan, shape: Shape, work: Work, device: Device, run: Path) -> Forecast:
    counts = plan.counts
    steps_per_epoch = plan.order.steps_per_epoch
    held = memory.parts(plan, shape, work, device)
    return {
        "plan_id": plan.plan_id,
        "base": cast(BaseFacts, {"checkpoint": plan.recipe.base.checkpoint, **plan.base.model_dump()}),
        "train": [cast(SourceFacts, {**source.model_dump(), "read": ""}) for source in plan.train],
        "holdout": [cast(SourceFacts, {**source.model_dump(), "read": ""}) for source in plan.holdout],
        "steps": plan.steps,
        "steps_per_epoch": steps_per_epoch,
        "rows": counts.rows,
        "examples": counts.examples,
        "tokens": round(mean_tokens(plan, 0, plan.steps)),
        "tokens_per_epoch": counts.tokens,
        "supervised_tokens_per_epoch": counts.supervised_tokens,
        "cut_rows": counts.cut_rows,
        "cut_tokens": counts.cut_tokens,
        "left_out_rows": counts.left_out_rows,
        "longest": counts.longest,
        "holdout_rows": plan.holdout_counts.rows,
        "holdout_tokens": plan.holdout_counts.tokens,
        "holdout_copies": _copies(plan),
        "split": plan.split.model_dump() if plan.split else None,
        "seen": [item.model_dump() for item in plan.seen],
        "notes": [*([f"held out by the rule of {plan.kept_rule}"] if plan.kept_rule else []), *plan.seen_told],
        "total_parameters": plan.total_parameters,
        "trainable_parameters": plan.trainable_parameters,
        "micro_batch_tokens": work.micro_batch,
        "memory_bytes": sum(held.values()),
        "memory": held,
        "machine_memory_bytes": device.bytes,
        "host_memory": (host := memory.host_parts(plan, device)),
        "host_memory_bytes": sum(host.values()),
        "host_bytes": device.host_bytes,
        "checkpoint_bytes": checkpoint_bytes(plan),
        "run_bytes": run_bytes(plan, shape.layers),
        "free_bytes": free_bytes(run),
        "guard": {"spike": plan.recipe.guard.spike, "not_finite": plan.recipe.guard.not_finite},
        "publish": _target(plan.recipe.publish),
        "warnings": warnings(plan),
    }


def warnings(plan: Plan) -> list[str]:
    """Warnings about settings you may regret."""
    if not cadence.may_lose_best(plan.recipe):
        return []
    return [
        f"checkpoint.save_best is false, and evaluations come every {plan.recipe.evaluate.every}: the best one may not be committed"
    ]


def on_devices(plan: Plan, shape: Shape, work: Work, device_bytes: int) -> list[OfDevices]:
    """The memory of each of several GPUs, with the whole model on each and with a shared one; computed without weights."""
    rows: list[OfDevices] = []
    for world_size in DEVICES:
        device = Device(device_bytes, is_gpu=True, world_size=world_size)
        replicated = sum(memory.parts(plan, shape, work, device).values())
        sharded = memory.sharded_bytes(plan, shape, work, device)
        rows.append(
            {
                "devices": world_size,
                "replicated_bytes": replicated,
                "replicated_fits": memory.fits(replicated, device),
                "sharded_bytes": sharded,
                "sharded_fits": memory.fits(sharded, device),
            }
        )
    return rows


def _copies(plan: Plan) -> int:
    """Rows neither trained on nor evaluated, because they repeat a held-out one."""
    is_by_content = plan.split is not None
    rows = sum(pin.rows for pin in plan.train) - plan.counts.bad_rows
    return rows - plan.counts.rows - plan.holdout_counts.rows if is_by_content else 0


def _target(publish: Publish | None) -> Target | None:
    return {"repo": publish.repo, "private": publish.private} if publish else None
