"""The forecast of a plan: its rows, steps, memory and disk. Formulas; it must measure nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from finetune.plan import cadence, memory
from finetune.plan import strategy as strategies
from finetune.plan.disk import checkpoint_bytes, commit_bytes, free_bytes, run_bytes
from finetune.plan.memory import Device, Work
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape
from finetune.plan.shown import (
    BaseFacts,
    Forecast,
    MirrorFacts,
    MixtureFacts,
    OfDevices,
    RateFacts,
    SourceFacts,
    Target,
)
from finetune.recipe.schema import Publish

DEVICES = (1, 2, 4, 8, 16, 32, 64)
HOST_DEVICES = 8  # of a host: they share rows where the strategy is `hsdp`
CARD_BYTES = 80 * 2**30  # of a GPU, if this machine has none


def forecast(plan: Plan, shape: Shape, work: Work, device: Device, run: Path, tokens: Sequence[int]) -> Forecast:
    """`tokens` are those of the examples of each source."""
    counts = plan.counts
    steps_per_epoch = plan.order.steps_per_epoch
    of_run, of_epoch = (
        _tokens(plan, tokens, drawn) for drawn in (plan.order.drawn_after(plan.steps), plan.order.examples_per_epoch)
    )
    held = strategies.parts(plan, shape, work, device)
    return {
        "plan_id": plan.plan_id,
        "base": cast(BaseFacts, {"checkpoint": plan.recipe.base.checkpoint, **plan.base.model_dump()}),
        "train": [cast(SourceFacts, {**source.model_dump(), "read": ""}) for source in plan.train],
        "holdout": [cast(SourceFacts, {**source.model_dump(), "read": ""}) for source in plan.holdout],
        "order": plan.recipe.data.order,
        "mixture": _mixture(plan, of_run),
        "learning_rate": _rates(plan),
        "steps": plan.steps,
        "steps_per_epoch": steps_per_epoch,
        "rows": counts.rows,
        "examples": counts.examples,
        "tokens": round(sum(of_run)),
        "tokens_per_epoch": round(sum(of_epoch)),
        "supervised_tokens_per_epoch": round(counts.supervised_tokens * sum(of_epoch) / counts.tokens),
        "cut_rows": counts.cut_rows,
        "cut_tokens": counts.cut_tokens,
        "left_out_rows": counts.left_out_rows,
        "longest": counts.longest,
        "arrangement": plan.arrangement,
        "holdout_rows": plan.holdout_counts.rows,
        "holdout_tokens": plan.holdout_counts.tokens,
        "holdout_copies": _copies(plan),
        "split": plan.split.model_dump() if plan.split else None,
        "seen": [item.model_dump() for item in plan.seen],
        "notes": [*([f"held out by the rule of {plan.kept_rule}"] if plan.kept_rule else []), *plan.seen_told],
        "total_parameters": plan.total_parameters,
        "trainable_parameters": plan.trainable_parameters,
        "active_parameters": plan.active_parameters or plan.total_parameters,
        "strategy": strategies.strategy(plan, shape, device),
        "asked_strategy": device.asked
        if plan.recipe.train.strategy == "auto" and device.asked
        else plan.recipe.train.strategy,
        "world_size": device.world_size,
        "micro_batch_tokens": work.micro_batch,
        "memory_bytes": sum(held.values()),
        "memory": held,
        "machine_memory_bytes": device.bytes,
        "host_memory": (host := memory.host_parts(plan, shape, work, device)),
        "host_memory_bytes": sum(host.values()),
        "host_bytes": device.host_bytes,
        "checkpoint_bytes": checkpoint_bytes(plan),
        "run_bytes": run_bytes(plan, shape.layers),
        "free_bytes": free_bytes(run),
        "guard": {"spike": plan.recipe.guard.spike, "not_finite": plan.recipe.guard.not_finite},
        "mirror": _mirror(plan, shape, run),
        "publish": _target(plan.recipe.publish),
        "warnings": warnings(plan),
    }


def _tokens(plan: Plan, tokens: Sequence[int], drawn: int) -> list[float]:
    """Tokens of each source in the first examples that are drawn, by the average of the source."""
    [counts] = plan.order.drawn_of_sources(np.array([drawn])).tolist()
    return [count * total / size for count, total, size in zip(counts, tokens, plan.sizes, strict=True)]


def _mixture(plan: Plan, tokens: Sequence[float]) -> list[MixtureFacts]:
    """How much of each source the run draws; `tokens` are those that it trains on."""
    order = plan.order
    of_run, of_epoch = order.drawn_of_sources(
        np.array([order.drawn_after(plan.steps), order.examples_per_epoch])
    ).tolist()
    return [
        {
            "name": pin.name,
            "examples": size,
            "examples_per_epoch": of_epoch[number],
            "epochs": of_run[number] / size,
            "token_share": tokens[number] / sum(tokens),
        }
        for number, (pin, size) in enumerate(zip(plan.train, plan.sizes, strict=True))
    ]


def _rates(plan: Plan) -> RateFacts:
    optimizer = plan.recipe.optimizer
    return {
        "schedule": optimizer.schedule,
        "peak": optimizer.learning_rate,
        "warmup_steps": plan.warmup_steps,
        "last": plan.learning_rate(plan.steps),
    }


def warnings(plan: Plan) -> list[str]:
    """Warnings about settings you may regret."""
    if not cadence.may_lose_best(plan.recipe):
        return []
    return [
        f"checkpoint.save_best is false, and evaluations come every {plan.recipe.evaluate.every}: the best one may not be committed"
    ]


def on_devices(plan: Plan, shape: Shape, work: Work, device_bytes: int) -> list[OfDevices]:
    """The memory of each of several GPUs, with the whole model on each and with a shared one, and what fits: the strategy and the
    micro-batch that `auto` takes there. Computed without weights."""
    rows: list[OfDevices] = []
    is_shared = strategies.unshardable_plan(plan) is None
    for world_size in DEVICES:
        device = Device(device_bytes, is_gpu=True, world_size=world_size, processes=min(world_size, HOST_DEVICES))
        replicated = sum(memory.parts(plan, shape, work, device).values())
        sharded = strategies.sharded_bytes(plan, shape, work, device) if is_shared or world_size == 1 else None
        rows.append(
            {
                "devices": world_size,
                "replicated_bytes": replicated,
                "replicated_fits": memory.fits(replicated, device),
                "sharded_bytes": sharded,
                "sharded_fits": sharded is not None and memory.fits(sharded, device),
                **_taken(plan, shape, device),
            }
        )
    return rows


class _Taken(TypedDict):
    """The last keys of `OfDevices`."""

    strategy: str
    micro_batch_tokens: int | None


def _taken(plan: Plan, shape: Shape, device: Device) -> _Taken:
    """What the recipe's own keys lead to on some devices, with micro-batches as `auto` chooses them."""
    name, step = strategies.strategy(plan, shape, device), plan.recipe.train.batch_size * plan.counts.longest
    tokens = strategies.micro_batch_tokens(plan, shape, device)
    size = sum(strategies.parts(plan, shape, Work(tokens, step), device).values())
    return {"strategy": name, "micro_batch_tokens": tokens if memory.fits(size, device) else None}


def _copies(plan: Plan) -> int:
    """Rows neither trained on nor evaluated, because they repeat a held-out one."""
    is_by_content = plan.split is not None
    rows = sum(pin.rows for pin in plan.train) - plan.counts.bad_rows
    return rows - plan.counts.rows - plan.holdout_counts.rows if is_by_content else 0


def _mirror(plan: Plan, shape: Shape, run: Path) -> MirrorFacts | None:
    """Where the run is copied to, and how much of it."""
    rules = plan.recipe.mirror
    if rules is None:
        return None
    best, every = rules.keep.best, rules.keep.every
    kept = [
        f"the last {rules.keep.last}" if rules.keep.last > 1 else "the last",
        f"the best {best.count} by {best.metric}" if best else "the best",
        *([f"every {every}"] if every else []),
    ]
    return {
        "to": rules.place_of(run.absolute().name),
        "every": f"every {rules.every}, and the last" if rules.every else "every commit",
        "keep": kept,
        "commit_bytes": commit_bytes(plan, shape.layers),
    }


def _target(publish: Publish | None) -> Target | None:
    return {"repo": publish.repo, "private": publish.private} if publish else None
