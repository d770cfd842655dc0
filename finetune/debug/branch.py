"""Floor 7. A new run from any step of another one, with other keys, or without some rows.

The checkpoint is linked, not copied, and what a reader must know of where it comes from is in the plan: `Plan.parent`. From there on a branch is
a run like any other.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune import journal
from finetune import plan as plans
from finetune.checkpoints import lease
from finetune.checkpoints.durable import failures, replace_file
from finetune.checkpoints.lease import Lease
from finetune.checkpoints.manifest import Checkpoint, Manifest, verify
from finetune.checkpoints.refs import find, parse
from finetune.checkpoints.store import RESUME_FILES, Store
from finetune.contract import differences
from finetune.debug.replay import materialize
from finetune.debug.rerun import Rerun
from finetune.errors import CheckpointError, RunError
from finetune.opening import WORLD, facts_of
from finetune.plan import Parent, Plan, warmup_of
from finetune.recipe.load import LoadedRecipe, dumps, loads
from finetune.recipe.schema import Recipe
from finetune.resolve import Resolved, resolve
from finetune.run import train
from finetune.state import start_accelerator
from finetune.trainer_state import HISTORY, without_evaluations

# What a checkpoint's tensors are shaped and rounded by.
FIXED = ("base", "adapter", "train.weights")
SHOWN_ROWS = 20


@dataclass(frozen=True)
class Choices:
    """What is another way in a branch."""

    overrides: Sequence[str] = ()
    skipped_rows: str | None = None
    """Ids like `512,77`, or a file: a line each, an id or an object with `row`."""
    schedule: str = "continue"
    """`continue` goes on where the learning rate is, `restart` begins a curve of its own, warm-up included."""
    is_optimizer_reset: bool = False


def branch(
    ref: str,
    run: Path | None,
    choices: Choices,
    is_quiet: bool = False,
    until: int | None = None,
    is_to_train: bool = True,
) -> Path:
    """Makes the run and trains it, to its end or to step `until`; returns its directory. A branch that is there already is trained on."""
    origin, step = _origin(ref)
    run = run or origin.with_name(f"{origin.name}-{step}")
    parent_plan, parent_facts = plans.load(origin)
    loaded = loads(dumps(parent_plan.recipe), f"{origin.name}@{step}", choices.overrides)
    _refuse_other_tensors(parent_plan.recipe, loaded.recipe, choices, f"{origin}@{step}")
    accelerator = start_accelerator(loaded.recipe.train)
    checkpoint = _checkpoint(origin, step)
    if accelerator.is_main_process:
        resolved = resolve(loaded, like=parent_plan)
        plan = _plan(resolved, parent_plan, parent_facts["run"], f"{origin.name}@{step}", step, checkpoint, choices)
        if not _is_there(run, plan):
            facts = facts_of(accelerator) | {
                "micro_batch_tokens": resolved.micro_batch_tokens,
                "run": secrets.token_hex(8),
            }
            with lease.acquire(run, secrets.token_hex(4)) as held:
                _make(run, plan, facts, loaded.recipe, origin, checkpoint, choices, held)
    accelerator.wait_for_everyone()
    if is_to_train:
        train(
            LoadedRecipe(loaded.recipe, dumps(loaded.recipe), str(run / "recipe.yaml"), {"": 0}),
            run,
            is_quiet=is_quiet,
            until=until,
        )
    return run


def _origin(ref: str) -> tuple[Path, int]:
    """The run and the step that a ref names; the step need not be stored."""
    parsed = parse(ref)
    if parsed.kind not in ("run", "base"):
        raise CheckpointError(f"`{ref}` is not a step of a run", hint="name RUN@STEP, RUN@last or RUN@best")
    if isinstance(parsed.step, int):
        return parsed.run, parsed.step
    return parsed.run, find(parsed).step


def _refuse_other_tensors(old: Recipe, new: Recipe, choices: Choices, where: str) -> None:
    changed = differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    lines = [
        f"{key}: {was} -> {now}"
        for key, was, now in changed
        if any(key == name or key.startswith(f"{name}.") for name in FIXED)
    ]
    if lines:
        hint = "start a run of its own, with `base.checkpoint` naming the checkpoint to begin with"
        raise RunError("has tensors that do not fit:\n  " + "\n  ".join(lines), where=where, hint=hint)
    if old.optimizer.name != new.optimizer.name and not choices.is_optimizer_reset:
        message = f"has moments of {old.optimizer.name}, which {new.optimizer.name} cannot use"
        raise RunError(message, where=where, hint="use --reset-optimizer")


def _checkpoint(origin: Path, step: int) -> Checkpoint | None:
    """The checkpoint to begin with, pinned and sound; one that was never stored, or not as a whole, is made real. None is the base."""
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


def _plan(
    resolved: Resolved, old: Plan, run: str, ref: str, step: int, checkpoint: Checkpoint | None, choices: Choices
) -> Plan:
    recipe, new = resolved.plan.recipe, resolved.plan
    changed = differences(old.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
    lines = [f"{key}: {was} -> {now}" for key, was, now in changed]
    lines += [f"{key}: {was} -> {now}" for key, was, now in _other_data(old, new)]
    has_same_rows = not _other_data(old, new) and old.recipe.data.train == recipe.data.train
    skipped = set(old.skipped_rows) if has_same_rows else set()
    if old.skipped_rows and not has_same_rows:
        lines.append(f"rows of other data are no longer left out: {_listed(old.skipped_rows)}")
    if choices.skipped_rows:
        rows = row_ids(choices.skipped_rows)
        _refuse_unknown(rows, resolved)
        skipped |= set(rows)
        lines.append(f"rows left out: {_listed(rows)}")
    if choices.is_optimizer_reset:
        lines.append("optimizer: reset")
    if choices.schedule == "restart":
        lines.append(f"schedule: restarted after step {step}")
    start = step if choices.schedule == "restart" else old.schedule_start
    if new.steps <= step:
        hint = f"name an earlier step, or set train.steps to more than {step}"
        raise RunError(f"has {new.steps} steps in all, so none is left after step {step}", where=ref, hint=hint)
    digest = checkpoint.manifest.digest if checkpoint else None
    return new.model_copy(
        update={
            "schedule_start": start,
            "warmup_steps": warmup_of(recipe, new.steps - start),
            "segments": old.segments if choices.schedule == "continue" else (),
            "skipped_rows": tuple(sorted(skipped)),
            "skipped_examples": tuple(np.flatnonzero(np.isin(resolved.train.rows, sorted(skipped))).tolist()),
            "parent": Parent(ref=ref, run=run, step=step, digest=digest, plan_id=old.plan_id, changes=tuple(lines)),
        }
    )


def _other_data(old: Plan, new: Plan) -> list[tuple[str, object, object]]:
    """Sources whose content is not what it was, though they are called the same."""
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


def _is_there(run: Path, plan: Plan) -> bool:
    """Whether the branch was made before, by the same command. RunError where there is another run."""
    if not (run / "plan.json").exists():
        return False
    if plan.plan_id in plans.load(run)[0].plan_ids:
        return True
    raise RunError("is another run", where=str(run), hint="use another --run")


def _make(
    run: Path,
    plan: Plan,
    facts: dict,
    recipe: Recipe,
    origin: Path,
    checkpoint: Checkpoint | None,
    choices: Choices,
    held: Lease,
) -> None:
    """The plan goes last: until it is there, there is no run, and the same command begins anew."""
    is_comparable = _has_same_holdout(plans.load(origin)[0], plan)
    store, ours = Store(run), {"ref": plan.parent.ref, "digest": plan.parent.digest}
    for left in store.checkpoints():  # of a branch that was cut off while it was made
        if left.manifest.parent != ours:
            hint = "use another --run; if it is a run that lost its plan.json, restore that"
            raise RunError("has checkpoints of something else", where=str(run), hint=hint)
        store.remove(left)
    if checkpoint:
        Store(origin).pin(checkpoint.step, f"branch-{facts['run']}")
        store.pin(checkpoint.step, "begin")  # every step of the branch is run again from here
        _link(store, checkpoint, plan, facts, choices, held, is_comparable)
    (run / "journal.jsonl").unlink(missing_ok=True)
    writer = journal.Journal(run)
    for record in _past_of(origin, plan.parent.step, is_comparable):
        writer.append(record)
    parent = {name: value for name, value in plan.parent.model_dump(mode="json").items() if name != "step"}
    writer.append(journal.event("branched", held.attempt, step=plan.parent.step, **parent))
    writer.sync()
    writer.close()
    with failures(run, RunError):
        replace_file(run / "recipe.yaml", dumps(recipe).encode())
        replace_file(run / "plan.json", plan.dump(facts))


def _link(
    store: Store, checkpoint: Checkpoint, plan: Plan, facts: dict, choices: Choices, held: Lease, is_comparable: bool
) -> None:
    """The checkpoint as the first one of the branch; of the optimizer nothing, where it is reset, and of held-out figures nothing, where
    other rows are held out."""
    attempt = store.begin(checkpoint.step, held.attempt)
    left_out = {*(RESUME_FILES if choices.is_optimizer_reset else ()), *(() if is_comparable else (HISTORY,))}
    for name, record in checkpoint.manifest.files.items():
        if name not in left_out:
            attempt.link(name, checkpoint.path / name, record)
    if not is_comparable and HISTORY in checkpoint.manifest.files:
        history = json.loads((checkpoint.path / HISTORY).read_bytes())
        attempt.write_json(HISTORY, without_evaluations(history))
    if choices.is_optimizer_reset:
        attempt.write_tensors("optimizer.safetensors", [], {})
        record = {"step": checkpoint.step, "optimizer": plan.recipe.optimizer.name, "scalars": {}}
        attempt.write_json("state.json", record)
    manifest = Manifest(
        run=facts["run"],
        attempt=held.attempt,
        step=checkpoint.step,
        parent={"ref": plan.parent.ref, "digest": checkpoint.manifest.digest},
        plan_id=plan.plan_id,
        amendments=checkpoint.manifest.amendments,
        metrics=checkpoint.manifest.metrics if is_comparable else {},
        versions=facts["versions"],
        world={name: facts[name] for name in WORLD},
        created=journal.now(),
    )
    store.commit(attempt, manifest, held.check)


def _has_same_holdout(old: Plan, new: Plan) -> bool:
    """Whether the held-out figures of two plans are about the same examples."""
    is_drawn = not isinstance(new.recipe.data.holdout, list)
    drawn = (old.train, old.recipe.train.seed, old.recipe.data.holdout) == (
        new.train,
        new.recipe.train.seed,
        new.recipe.data.holdout,
    )
    pinned = (old.holdout, old.encoding, old.holdout_counts) == (new.holdout, new.encoding, new.holdout_counts)
    return pinned and (drawn or not is_drawn)


def _past_of(origin: Path, step: int, is_comparable: bool) -> list[dict]:
    """The steps that led here, for the guard and the loss curve, and what was evaluated."""
    records = journal.read(origin)
    trained = [record for number, record in sorted(journal.steps(records).items()) if number <= step]
    evaluated = journal.that_count(records, lambda record: record.get("event") == "evaluated") if is_comparable else {}
    return trained + [record for number, record in sorted(evaluated.items()) if number <= step]
