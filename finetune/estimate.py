"""Floor 0. What a plan will need: bytes of memory, of one checkpoint, of the whole run. Formulas, no measuring.

`plan` prints the forecast; `plan` and `train` refuse a run that cannot fit on the disk.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune.errors import RunError
from finetune.plan import Plan
from finetune.recipe.schema import LoraAdapter, Publish

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT = 4  # bytes: weights, gradients and moments are fp32 whatever the precision of the products
PROCESS_BYTES = 700 * 2**20  # interpreter, torch, transformers and their buffers, seen on a CPU
MOMENTS = {"adamw": 2, "sgd": 1}
COMPANION_BYTES = 8 * 2**20  # tokenizer and configs, at the large end


class Shape(NamedTuple):
    """What of a model's config decides the size of its activations."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def shape_of(config: "PretrainedConfig") -> Shape:
    """The shape in a transformers config, by the names its families use."""
    text = config.get_text_config()
    hidden = text.hidden_size
    return Shape(
        text.num_hidden_layers, hidden, getattr(text, "intermediate_size", None) or 4 * hidden, text.vocab_size
    )


def memory_bytes(plan: Plan, shape: Shape, micro_batch_tokens: int) -> int:
    """Peak of one process: weights, gradients, moments, and the activations that one micro-batch keeps for backward."""
    moments = MOMENTS[plan.recipe.optimizer.name]
    state = FLOAT * (plan.total_parameters + (1 + moments) * plan.trainable_parameters)
    width = 2 if plan.recipe.train.precision == "bf16" else 4
    # a decoder layer keeps about 10 hidden and 4 intermediate vectors a token
    kept = micro_batch_tokens * shape.layers * (10 * shape.hidden + 4 * shape.intermediate) * width
    share = plan.counts.supervised_tokens / max(1, plan.counts.tokens)
    logits = (
        3 * FLOAT * round(share * micro_batch_tokens) * shape.vocabulary
    )  # fp32 logits, their softmax, their gradient
    casts = width * plan.total_parameters if plan.recipe.train.precision == "bf16" else 0
    staging = 2 * state_bytes(plan)  # two saves may be under way
    return PROCESS_BYTES + state + kept + logits + casts + staging


def state_bytes(plan: Plan) -> int:
    """What every full checkpoint holds anew: the trained weights and their moments."""
    optimizer = plan.recipe.optimizer
    moments = MOMENTS[optimizer.name] if optimizer.name == "adamw" or optimizer.momentum else 0
    return FLOAT * (1 + moments) * plan.trainable_parameters


def shared_bytes(plan: Plan) -> int:
    """What the first checkpoint writes and the later ones link to: frozen weights, tokenizer and configs."""
    is_lora = isinstance(plan.recipe.adapter, LoraAdapter)
    return COMPANION_BYTES + (0 if is_lora else FLOAT * (plan.total_parameters - plan.trainable_parameters))


def checkpoint_bytes(plan: Plan) -> int:
    """A first checkpoint, with all that it holds."""
    return shared_bytes(plan) + state_bytes(plan)


def run_bytes(plan: Plan) -> int:
    """All checkpoints that are on disk at once at the end, and one being written; what is linked counts once."""
    keep = plan.recipe.checkpoint.keep
    full = keep.last + (keep.best or 0) + (plan.steps // keep.every.steps if keep.every else 0)
    milestones = plan.steps // keep.weights_every.steps if keep.weights_every else 0
    return shared_bytes(plan) + (full + 1) * state_bytes(plan) + milestones * FLOAT * plan.trainable_parameters


def refuse_small_disk(plan: Plan, run: Path) -> None:
    """Raises RunError when the disk cannot take the first checkpoint and the one that replaces it."""
    needed, free = shared_bytes(plan) + 2 * state_bytes(plan), free_bytes(run)
    if needed > free:
        raise RunError(
            f"two checkpoints need {readable(needed)}, and the disk has {readable(free)} left",
            where=str(run),
            hint="free some space, or use --run on another disk",
        )


def forecast(plan: Plan, config: "PretrainedConfig", micro_batch_tokens: int, run: Path) -> dict:
    """The facts that `plan --json` prints; sizes in bytes, counts of all epochs unless named otherwise."""
    shape, counts = shape_of(config), plan.counts
    steps_per_epoch = plan.order.steps_per_epoch
    return {
        "plan_id": plan.plan_id,
        "base": {"checkpoint": plan.recipe.base.checkpoint, **plan.base.model_dump()},
        "train": [source.model_dump() for source in plan.train],
        "holdout": [source.model_dump() for source in plan.holdout],
        "steps": plan.steps,
        "steps_per_epoch": steps_per_epoch,
        "rows": counts.rows,
        "examples": counts.examples,
        "tokens": round(counts.tokens * plan.steps / steps_per_epoch),
        "tokens_per_epoch": counts.tokens,
        "supervised_tokens_per_epoch": counts.supervised_tokens,
        "cut_rows": counts.cut_rows,
        "cut_tokens": counts.cut_tokens,
        "left_out_rows": counts.left_out_rows,
        "longest": counts.longest,
        "holdout_rows": plan.holdout_counts.rows,
        "holdout_tokens": plan.holdout_counts.tokens,
        "total_parameters": plan.total_parameters,
        "trainable_parameters": plan.trainable_parameters,
        "micro_batch_tokens": micro_batch_tokens,
        "memory_bytes": memory_bytes(plan, shape, micro_batch_tokens),
        "machine_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "checkpoint_bytes": checkpoint_bytes(plan),
        "run_bytes": run_bytes(plan),
        "free_bytes": free_bytes(run),
        "guard": {"spike": plan.recipe.guard.spike, "not_finite": plan.recipe.guard.not_finite},
        "publish": _target(plan.recipe.publish),
    }


def _target(publish: Publish | None) -> dict | None:
    return {"repo": publish.repo, "private": publish.private} if publish else None


def table(facts: dict) -> str:
    """The forecast for a reader."""
    base = facts["base"]
    pin = base["revision"] or f"{base['digest'][:19]}…"
    rows = [("base", f"{base['checkpoint']}  {pin}")]
    for part in ("train", "holdout"):
        rows += [
            (part, f"{pin['name']}  {pin['rows']:,} rows  {pin['revision'] or pin['fingerprint'][:19] + '…'}")
            for pin in facts[part]
        ]
    share = facts["supervised_tokens_per_epoch"] / facts["tokens_per_epoch"]
    rows += [
        (
            "rows",
            f"{facts['rows']:,} to train on, {facts['holdout_rows']:,} held out ({facts['holdout_tokens']:,} tokens)",
        ),
        (
            "tokens",
            f"{facts['tokens_per_epoch']:,} an epoch, {facts['supervised_tokens_per_epoch']:,} supervised ({share:.0%})",
        ),
        (
            "cut",
            f"{facts['cut_rows']:,} rows by {facts['cut_tokens']:,} tokens; the longest kept has {facts['longest']:,}",
        ),
        ("left out", f"{facts['left_out_rows']:,} rows with nothing to learn within task.max_length"),
        ("steps", f"{facts['steps']:,} ({facts['steps_per_epoch']:,} an epoch), {facts['tokens']:,} tokens in all"),
        ("parameters", f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} are trained"),
        (
            "memory",
            f"about {readable(facts['memory_bytes'])}; this machine has {readable(facts['machine_memory_bytes'])}",
        ),
        ("checkpoint", f"{readable(facts['checkpoint_bytes'])} each, {readable(facts['run_bytes'])} for the run"),
        ("disk", f"{readable(facts['free_bytes'])} free"),
        ("guard", f"spike: {facts['guard']['spike']}, not finite: {facts['guard']['not_finite']}"),
        ("plan", facts["plan_id"]),
    ]
    if facts["publish"]:
        rows.append(
            ("publish", f"{facts['publish']['repo']}, {'private' if facts['publish']['private'] else 'public'}")
        )
    lines = [f"{name:11}{text}" for name, text in rows]
    if facts["memory_bytes"] > facts["machine_memory_bytes"]:
        lines.append(
            "warning: the memory forecast is more than this machine has; lower train.micro_batch_tokens, or use adapter: {name: lora}"
        )
    return "\n".join(lines)


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
