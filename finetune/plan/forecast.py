"""Forecasts of a plan: bytes of memory, of one checkpoint, of the whole run. Formulas; it must measure nothing."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from finetune.errors import RunError
from finetune.plan import cadence, memory
from finetune.plan.memory import Device, Work, state_bytes
from finetune.plan.pace import mean_tokens
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape
from finetune.plan.shown import BaseFacts, Forecast, OfDevices, SourceFacts, Target
from finetune.recipe.schema import Every, Publish

COMPANION_BYTES = 8 * 2**20  # tokenizer and configs, at the large end
# of files beside tensors, as measured; each number is of one
TENSOR_BYTES = 1_100  # of a tensor and its moments: records in the manifest, headers, counters
ENTRY_BYTES = 140  # of the history of losses
FILES, BLOCK_BYTES = 9, 4096
STEP_BYTES, EVENT_BYTES = 330, 400  # of the journal
ROW_BYTES, NORM_BYTES = 16, 9  # in Parquet
LAYERS = 32  # of a base without a config here
MATRICES = 7  # of a layer, roughly
DEVICES = (1, 2, 4, 8, 16, 32, 64)
CARD_BYTES = 80 * 2**30  # of a GPU, if this machine has none


def shared_bytes(plan: Plan) -> int:
    """Bytes written by the first checkpoint and linked by later ones: frozen weights, tokenizer and configs."""
    frozen = memory.stored_width(plan) * (plan.total_parameters - plan.trainable_parameters)
    return COMPANION_BYTES + (0 if memory.is_beside(plan) else frozen)


def checkpoint_bytes(plan: Plan) -> int:
    """A whole first checkpoint."""
    return shared_bytes(plan) + state_bytes(plan)


def run_bytes(plan: Plan, layers: int = LAYERS) -> int:
    """Most disk space at once, with one checkpoint being written and one milestone packaged; linked files count once."""
    rule, publish = plan.recipe.checkpoint.keep, plan.recipe.publish
    is_evaluated = plan.holdout_counts.examples > 0
    for_good = _multiples(plan, [rule.every, publish.milestones if publish else None])
    milestones = len(_multiples(plan, [rule.weights_every]) - for_good)
    full = rule.last + (rule.best or int(is_evaluated)) + len(for_good) + 1
    small = _small_bytes(plan, layers)
    checkpoints = full * (state_bytes(plan) + small) + milestones * (memory.trained_bytes(plan) + small)
    packages = package_bytes(plan) if publish and publish.milestones else 0
    return shared_bytes(plan) + checkpoints + _history_bytes(plan, layers) + packages


def package_bytes(plan: Plan) -> int:
    """A package: the whole model, or the adapter alone in fp32. With a small adapter it is many times larger than a checkpoint."""
    asked = plan.recipe.package
    if asked.form == "adapter":
        return COMPANION_BYTES + memory.trained_bytes(plan)
    width = 2 if (asked.dtype or plan.recipe.train.precision) == "bf16" else memory.FLOAT
    return COMPANION_BYTES + width * plan.total_parameters


def _multiples(plan: Plan, cadences: Iterable[Every | None]) -> set[int]:
    """The steps at which one of the cadences falls due."""
    steps = [each.steps for each in cadences if each and each.steps]
    return {step for every in steps for step in range(every, plan.steps + 1, every)}


def _small_bytes(plan: Plan, layers: int) -> int:
    """Bytes of a checkpoint beside tensors: manifest, counters, names of tensors, history of losses; files fill blocks."""
    entries = min(plan.steps, cadence.HISTORY_ENTRIES) + _evaluations(plan)
    return _trained_tensors(plan, layers) * TENSOR_BYTES + entries * ENTRY_BYTES + FILES * BLOCK_BYTES


def _history_bytes(plan: Plan, layers: int) -> int:
    """Journal, losses of rows and norms of modules."""
    saves = len(_multiples(plan, [each for each in cadence.saves_at_most(plan.recipe) if each.steps]))
    events = (saves + _evaluations(plan)) * EVENT_BYTES
    steps = plan.steps * (STEP_BYTES + plan.recipe.train.batch_size * ROW_BYTES + (layers + 3) * NORM_BYTES)
    return events + steps


def _evaluations(plan: Plan) -> int:
    every = plan.recipe.evaluate.every
    return plan.steps // every.steps if every and every.steps else 0


def _trained_tensors(plan: Plan, layers: int) -> int:
    """Number of trained tensors, roughly."""
    beside = plan.recipe.adapter.tensors_beside_a_matrix if plan.recipe.adapter else 0
    return MATRICES * beside * layers if beside else 12 * layers + 3


def refuse_small_disk(plan: Plan, run: Path) -> None:
    """Raises RunError when the disk cannot take the first checkpoint and the one that replaces it."""
    needed, free = shared_bytes(plan) + 2 * state_bytes(plan), free_bytes(run)
    if needed > free:
        raise RunError(
            f"two checkpoints need {readable(needed)}, and the disk has {readable(free)} left",
            where=str(run),
            hint="free some space, or use --run on another disk",
        )


def forecast(plan: Plan, shape: Shape, work: Work, device: Device, run: Path) -> Forecast:
    counts = plan.counts
    steps_per_epoch = plan.order.steps_per_epoch
    held = memory.parts(plan, shape, work, device)
    return {
        "plan_id": plan.plan_id,
        "base": cast(BaseFacts, {"checkpoint": plan.recipe.base.checkpoint, **plan.base.model_dump()}),
        "train": [cast(SourceFacts, source.model_dump()) for source in plan.train],
        "holdout": [cast(SourceFacts, source.model_dump()) for source in plan.holdout],
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
    return sum(pin.rows for pin in plan.train) - plan.counts.rows - plan.holdout_counts.rows if is_by_content else 0


def _target(publish: Publish | None) -> Target | None:
    return {"repo": publish.repo, "private": publish.private} if publish else None


def free_bytes(directory: Path) -> int:
    """Free space where `directory` is or will be."""
    existing = next(parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def readable(size: float) -> str:
    """Like 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
