"""A new run from any step of another one, with other keys, or without some rows. The checkpoint is linked, not copied."""

import json
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.data.heldout import lineage
from finetune.debug import branch_directory
from finetune.debug.reexecute import Rerun
from finetune.debug.replay import materialize
from finetune.errors import CheckpointError, RunError, counted
from finetune.model import base
from finetune.plan.curve import warmup_of
from finetune.plan.plan import EarlierOrder, Parent, Plan, order_of, steps_of
from finetune.recipe.load import LoadedRecipe, dumps, loads
from finetune.recipe.resume_rules import differences
from finetune.recipe.schema import Recipe
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import lease
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives
from finetune.training.facts import facts_of
from finetune.training.readiness import refuse_gated
from finetune.training.resolve import Resolved, resolve
from finetune.training.resume import stand_in
from finetune.training.run import train
from finetune.training.strategy.start import start_accelerator

# They decide shape and rounding of a checkpoint's tensors.
FIXED = ("base", "adapter", "train.weights")
SHOWN_ROWS = 20


@dataclass(frozen=True)
class Choices:
    """The differences between a branch and its parent."""

    overrides: Sequence[str] = ()
    skipped_rows: str | None = None
    """Ids like `512,77`, or a file: a line each, an id or an object with `row`."""
    schedule: str = "continue"
    """`continue` keeps the curve of the learning rate, `restart` begins a new one, warm-up included."""
    is_optimizer_reset: bool = False


def branch(
    ref: str,
    run: Path | None,
    choices: Choices,
    *,
    is_quiet: bool = False,
    until: int | None = None,
    is_to_train: bool = True,
) -> Path:
    """Makes the run and trains it, to its end or to step `until`; returns its directory. Resumes an existing branch."""
    origin, step = _origin(ref)
    run = run or origin.with_name(f"{origin.name}-{step}")
    old, facts = RunDirectory(origin).plan()
    loaded = loads(dumps(old.recipe), f"{origin.name}@{step}", choices.overrides)
    _refuse_other_tensors(old.recipe, loaded.recipe, choices, f"{origin}@{step}")
    accelerator = start_accelerator(loaded.recipe.train)
    checkpoint = _checkpoint(origin, step)
    if accelerator.is_main_process:
        whole = stand_in(origin, old) if checkpoint else None
        small_files = base.small_files_of(whole) if whole else None
        resolved = resolve(loaded, like=old, stages=lineage.up_to(origin, step), stand_in=small_files)
        digest = checkpoint.manifest.digest if checkpoint else None
        parent = Parent(ref=f"{origin.name}@{step}", run=facts["run"], step=step, digest=digest, plan_id=old.plan_id)
        plan = _plan(resolved, old, parent, choices)
        if not branch_directory.is_there(run, plan):
            if (old.recipe.data, old.recipe.task) != (loaded.recipe.data, loaded.recipe.task):
                refuse_gated(resolved, parent.ref)
            facts = {
                **facts_of(accelerator, resolved.strategy),
                "micro_batch_tokens": resolved.micro_batch_tokens,
                "run": secrets.token_hex(8),
            }
            with lease.acquire(run, secrets.token_hex(4)) as held:
                is_reset = choices.is_optimizer_reset
                made = branch_directory.Branch(run, origin, plan, facts, loaded.recipe, checkpoint, is_reset)
                told = branch_directory.make(made, held)
            if not is_quiet:
                told = [f"branched from {parent.ref}", *(plan.parent or parent).changes, *told]
            for line in told:
                print(line, file=sys.stderr)
    collectives.wait_for_everyone(accelerator)
    if is_to_train:
        recipe = LoadedRecipe(loaded.recipe, dumps(loaded.recipe), str(RunDirectory(run).recipe), {"": 0})
        train(recipe, run, is_quiet=is_quiet, until=until)
    return run


def _origin(ref: str) -> tuple[Path, int]:
    """The run and the step of a ref; the step need not be stored."""
    parsed = parse(ref)
    if parsed.kind != "run" and parsed.kind != "base":
        raise CheckpointError(f"`{ref}` is not a step of a run", hint="name RUN@STEP, or use it as base.checkpoint")
    if isinstance(parsed.step, int):
        return parsed.run, parsed.step
    return parsed.run, find(parsed).step


def _refuse_other_tensors(old: Recipe, new: Recipe, choices: Choices, where: str) -> None:
    lines = [
        f"{key}: {was} -> {now}"
        for key, was, now in _changes(old, new)
        if any(key == name or key.startswith(f"{name}.") for name in FIXED)
    ]
    if lines:
        hint = "start a new run, and name the checkpoint as its `base.checkpoint`"
        raise RunError("has tensors that do not fit:\n  " + "\n  ".join(lines), where=where, hint=hint)
    if old.optimizer.name != new.optimizer.name and not choices.is_optimizer_reset:
        message = f"has moments of {old.optimizer.name}, which {new.optimizer.name} cannot use"
        raise RunError(message, where=where, hint="use --reset-optimizer")


def _checkpoint(origin: Path, step: int) -> Checkpoint | None:
    """The first checkpoint, pinned and sound; materialized if it was never stored, or not fully. None is the base."""
    if step == 0:
        return None
    store = Store(origin)
    found = next((item for item in store.checkpoints() if item.step == step and item.manifest.kind == "full"), None)
    if found is None:
        threads = torch.get_num_threads()
        materialize(Rerun(origin), [step])
        torch.set_num_threads(threads)
        found = store.find(step)
    if damages := verify(found.path):
        hint = "name another step"
        raise CheckpointError(f"is damaged: {damages[0].file}: {damages[0].message}", where=str(found.path), hint=hint)
    return found


def _plan(resolved: Resolved, old: Plan, parent: Parent, choices: Choices) -> Plan:
    """The plan of the branch, with all its differences. Raises RunError if no step is left to train."""
    is_restarted = choices.schedule == "restart"
    new = _counted_on(resolved.plan, old, parent.step)
    lines = [f"{key}: {was} -> {now}" for key, was, now in _changes(old.recipe, new.recipe)]
    lines += [f"{name}: {was} -> {now}" for name, was, now in _other_data(old, new)]
    skipped, about_rows = _skipped(resolved, old, choices)
    lines += about_rows
    lines += ["optimizer: reset"] if choices.is_optimizer_reset else []
    if is_restarted:
        lines.append(f"schedule: restarted after step {parent.step}")
    if new.steps <= parent.step:
        hint = f"name an earlier step, or set train.steps to more than {parent.step}"
        message = f"has {counted(new.steps, 'step')} in all, so none is left after step {parent.step}"
        raise RunError(message, where=parent.ref, hint=hint)
    start = parent.step if is_restarted else old.schedule_start
    new = new.model_copy(
        update={
            "schedule_start": start,
            "warmup_steps": warmup_of(new.recipe, new.steps, start, new.earlier_orders),
            "segments": () if is_restarted else old.segments,
            "skipped_rows": tuple(skipped),
            "skipped_examples": tuple(np.flatnonzero(np.isin(resolved.train.rows, skipped)).tolist()),
        }
    )
    if new.earlier_orders != old.earlier_orders:
        lines += _course(new, old, parent.step)
    return new.model_copy(update={"parent": parent.model_copy(update={"changes": tuple(lines)})})


def _counted_on(new: Plan, old: Plan, step: int) -> Plan:
    """The plan of a branch: it continues at the next example that the run has not drawn, with any seed and batch size.

    Changed data has another order: some examples of the epoch repeat, and some do not come.
    """
    earlier = tuple(each for each in old.earlier_orders if each.until <= step)
    train = old.recipe.train
    has_other_order = (new.recipe.train.seed, new.recipe.train.batch_size) != (train.seed, train.batch_size)
    if step and has_other_order:
        drawn = old.order.drawn_after(step)
        order = EarlierOrder(until=step, drawn=drawn, seed=train.seed, batch_size=train.batch_size, steps=old.steps)
        earlier = (*earlier, order)
    steps = steps_of(new.recipe.train, order_of(new.recipe, new.sizes, earlier))
    return new.model_copy(update={"earlier_orders": earlier, "steps": steps})


def _course(new: Plan, old: Plan, step: int) -> list[str]:
    """The remaining steps with another seed or batch size."""
    order, next_step = new.order, step + 1
    epoch, place = divmod(int(order.positions_of(next_step)[0]), order.examples_per_epoch)
    rates = " -> ".join(f"{plan.learning_rate(next_step):.3g}" for plan in (old, new))
    return [
        f"goes on at example {place + 1} of {order.examples_per_epoch} in epoch {epoch + 1}",
        f"steps: {old.steps} -> {new.steps}",
        f"learning rate of step {next_step}: {rates}",
    ]


def _changes(old: Recipe, new: Recipe) -> list[tuple[str, object, object]]:
    return list(differences(old.model_dump(mode="json"), new.model_dump(mode="json")))


def _skipped(resolved: Resolved, old: Plan, choices: Choices) -> tuple[list[int], list[str]]:
    """The skipped rows, and a line if they differ from the parent's."""
    new, lines = resolved.plan, []
    has_same_rows = not _other_data(old, new) and old.recipe.data.train == new.recipe.data.train
    skipped = set(old.skipped_rows) if has_same_rows else set()
    if old.skipped_rows and not has_same_rows:
        lines.append(f"rows of other data are no longer left out: {_listed(old.skipped_rows)}")
    if choices.skipped_rows:
        rows = row_ids(choices.skipped_rows)
        _refuse_unknown(rows, resolved)
        skipped |= set(rows)
        lines.append(f"rows left out: {_listed(rows)}")
    return sorted(skipped), lines


def _other_data(old: Plan, new: Plan) -> list[tuple[str, object, object]]:
    """Sources with the same name and other content."""
    pairs = zip((*old.train, *old.holdout), (*new.train, *new.holdout), strict=False)
    return [
        (one.name, one.fingerprint, two.fingerprint)
        for one, two in pairs
        if one.name == two.name and one.fingerprint != two.fingerprint
    ]


def row_ids(text: str) -> list[int]:
    """`512,77`, or a file with a line for each: an id, or a JSON object with `row`, as bundles have them."""
    if re.fullmatch(r"[\d,\s]+", text):
        return sorted({int(word) for word in text.replace(",", " ").split()})
    try:
        values = [json.loads(line) for line in Path(text).read_text().splitlines() if line.strip()]
        return sorted({int(value["row"] if isinstance(value, dict) else value) for value in values})
    except (ValueError, KeyError, TypeError, OSError) as error:
        hint = "give ids like 512,77, or a file with a line for each"
        raise RunError(f"`{text}` has no row ids: {error}", where="--skip-rows", hint=hint) from None


def _refuse_unknown(rows: Sequence[int], resolved: Resolved) -> None:
    if missing := sorted(set(rows) - set(resolved.train.rows[np.isin(resolved.train.rows, rows)].tolist())):
        hint = "row ids count through the training sources; `finetune replay RUN --steps STEP --inspect` shows them"
        raise RunError(f"no training row is called {missing[:SHOWN_ROWS]}", where="--skip-rows", hint=hint)


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + (" …" if len(rows) > SHOWN_ROWS else "")
