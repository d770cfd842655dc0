"""The plan of a run directory: its own where the run exists, else a new one; and what has changed since it was made.

`run` calls `open_plan` under the lease. What may differ between a recipe and the run that it resumes is in `contract`.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from finetune.data.sources.open import fingerprint
from finetune.errors import BaseError, CheckpointError, RunError, counted
from finetune.model import base
from finetune.plan.facts import Facts, Machine, World
from finetune.plan.on_device import with_weights
from finetune.plan.plan import ROW_RULES, PinnedBase, PinnedSource, Plan
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.resume_rules import COMPILED, PLAIN, differences, outcome, recorded, rule_of, that_may_cost_bits
from finetune.recipe.schema import Base, Recipe, Source, is_drawn
from finetune.store import places
from finetune.store.checkpoints.store import Store
from finetune.store.run import scan
from finetune.store.run.directory import RunDirectory
from finetune.training import kernels
from finetune.training.evaluation_sets import sets_told, with_sets
from finetune.training.facts import facts_of, sharing_of, software
from finetune.training.older_rows import losses_of_older_rules
from finetune.training.readiness import refuse_gated
from finetune.training.resolve import Resolved, in_kernels, resolve


class Opened(NamedTuple):
    """The plan of a run directory, ready to be trained."""

    resolved: Resolved
    facts: Facts
    """What `plan.json` records beside the plan."""
    changes: list[str]
    """A line for everything that changed since the run was planned."""


def stand_in(run: Path, plan: Plan) -> Path | None:
    """The newest checkpoint of a run that trains whole weights, where its base cannot be had: it has all that a resume needs. None where
    the base is there, or nothing stands in for it: then loading the base says why."""
    # A checkpoint of an adapter has no weights of the base.
    if plan.recipe.is_adapted or places.bases():
        return None
    try:
        base.directory(plan.recipe.base, plan.base)
    except (BaseError, CheckpointError) as error:
        newest, _ = Store(run).newest_sound()
        if newest is None:
            return None
        about = f"{error.message}; step {newest.step} of this run has all weights and stands in for it"
        places.say(f"base {plan.recipe.base.checkpoint} {about}")
        return newest.path
    return None


def open_plan(
    loaded: LoadedRecipe,
    path: Path,
    accelerator: Accelerator,
    schedule: str | None = None,
    today: date | None = None,
) -> Opened:
    """Plan and facts of the run: its own where it exists, else new ones; and a line for everything that changed since.

    A recipe that asks for more epochs or steps extends the run. `schedule` is how its learning rate then goes on (see
    `Plan.extended`); where nothing is extended, it must be what the last extension was made with.
    """
    # What this machine and these libraries are: compared with what the run began on, and said where it differs.
    now = facts_of(accelerator)
    if RunDirectory(path).is_run:
        return _open_again(loaded, path, now, schedule, today)
    # Ignored silently, it would look as if it had worked.
    if schedule:
        raise _idle_schedule(path, schedule, "there is no run yet that could be extended")
    resolved = with_sets(resolve(loaded, is_to_load=True, today=today))
    resolved = in_kernels(resolved, kernels.chosen(loaded.recipe, resolved.base_directory))
    refuse_gated(resolved, loaded.file)
    facts: Facts = {
        **now,
        **sharing_of(resolved.strategy),
        "micro_batch_tokens": resolved.micro_batch_tokens,
        "kernels": resolved.kernels.name,
        # Random, and not the directory's name: a run that you move or copy stays the same run.
        "run": secrets.token_hex(8),
        "software": software(),
    }
    return Opened(resolved, facts, [*resolved.plan.seen_told, *sets_told(resolved.plan)])


def _open_again(loaded: LoadedRecipe, path: Path, now: Machine, schedule: str | None, today: date | None) -> Opened:
    """As `open_plan`, of a run that exists; `now` are the facts of this machine."""
    earlier, facts = RunDirectory(path).plan()
    # First: a base or a file that only moved is no change of the recipe.
    loaded = replace(loaded, recipe=_as_recorded(earlier, loaded.recipe))
    lines = _sorted_out(earlier, loaded.recipe)
    # Before anything is resolved: that may download and encode for hours.
    if lines["refused"]:
        raise RunError(
            "was started with another recipe:\n  " + "\n  ".join(lines["refused"]),
            where=str(path),
            hint=f"use another --run, or go on from a step of this one with `finetune branch {path}@STEP --set KEY=VALUE`",
        )
    if schedule and not lines["extended"] and not _is_as_extended(earlier, schedule):
        raise _idle_schedule(
            path, schedule, f"the recipe asks for the {counted(earlier.steps, 'step')} that the run has"
        )
    # A full fine-tune has all weights in each checkpoint, so a base that is gone does not end the run.
    checkpoint = stand_in(path, earlier)
    small_files = base.small_files_of(checkpoint) if checkpoint else None
    # At the old length first: what it trains on is compared with the plan, and only then extended.
    resolved = resolve(_with_length_of(earlier, loaded), earlier, True, today=today, stand_in=small_files)
    resolved = replace(with_sets(resolved, earlier), stand_in=checkpoint)
    is_kept = earlier.recipe.train.kernels == loaded.recipe.train.kernels
    took = kernels.chosen(loaded.recipe, resolved.base_directory, str(recorded(facts)["kernels"]) if is_kept else None)
    resolved = in_kernels(resolved, took)
    if earlier.recipe.train.micro_batch_tokens == loaded.recipe.train.micro_batch_tokens == "auto":
        tokens = facts["micro_batch_tokens"]  # decided once
        if took.parts is None and recorded(facts)["kernels"] not in (PLAIN, COMPILED):  # fused kernels keep less
            tokens = min(tokens, resolved.micro_batch_tokens)
        resolved = replace(resolved, micro_batch_tokens=tokens)
    decided: World = {"micro_batch_tokens": resolved.micro_batch_tokens, "kernels": took.name}
    now = {**now, **sharing_of(resolved.strategy), **decided}
    if lines["extended"]:
        plan = resolved.plan.extended(loaded.recipe.train, _recorded(path), schedule or "continue")
        resolved = replace(resolved, plan=plan)
    changes = [*_told(lines, earlier, resolved), *_differences_told(facts, now, loaded.recipe.train.reproducibility)]
    renewed: Facts = {**now, "run": facts["run"], "software": software()}
    # Where base and data were found this time, so that the next resume looks there first.
    if moved := facts.get("places", {}) | places.moved():
        renewed["places"] = moved
    return Opened(resolved, renewed, changes)


def _told(lines: dict[str, list[str]], earlier: Plan, resolved: Resolved) -> list[str]:
    """A line for everything in the recipe, and in how rows are read, that is not as it was."""
    changes = [
        *resolved.plan.seen_told,
        *sets_told(resolved.plan, earlier),
        *(f"taken from the recipe: {line}" for line in lines["taken"]),
    ]
    if earlier.split is None and is_drawn(earlier.recipe.data):
        changes.append("the held-out rows stay those that an older version drew, by train.seed")
    if extension := resolved.plan.extension if lines["extended"] else None:
        where = f"after step {extension['step']} (--schedule {extension['schedule']})"
        changes += [f"extended {where}: {line}" for line in lines["extended"]]
    if resolved.plan.row_rules < ROW_RULES:
        changes += losses_of_older_rules(resolved)
    return changes


def _differences_told(facts: Machine, now: Machine, reproducibility: str) -> list[str]:
    """A line for everything about the machine and its libraries that changed since the run was planned."""
    return [
        f"{name} changed: {old} -> {new}; bit equality may be lost"
        for name, old, new in that_may_cost_bits(facts, now, reproducibility)
    ]


def _as_recorded(earlier: Plan, recipe: Recipe) -> Recipe:
    """The recipe with the run's own names for base and data where its names lead to the same content, and the types that it chose."""
    old, recipe = earlier.recipe, with_weights(recipe, earlier, is_gpu=False)
    names = {name: getattr(old.base, name) for name in ("checkpoint", "revision")}
    is_renamed = recipe.base.model_copy(update=names) != recipe.base
    if is_renamed and _is_same_base(recipe.base, earlier.base):
        places.found(old.base.checkpoint, recipe.base.checkpoint, "base")
        recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update=names)})
    data = {
        name: _sources_as_recorded(getattr(recipe.data, name), getattr(old.data, name), pins)
        for name, pins in (("train", earlier.train), ("holdout", earlier.holdout))
    }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def _is_same_base(named: Base, pinned: PinnedBase) -> bool:
    try:
        return base.pin(named) == pinned
    except (BaseError, CheckpointError):  # it is refused as another base, with both names
        return False


def _sources_as_recorded(sources: object, old: object, pins: Sequence[PinnedSource]) -> object:
    """Sources under the names of a plan; a share or a count of rows as it is."""
    if not isinstance(sources, list) or not isinstance(old, list) or not len(sources) == len(old) == len(pins):
        return sources
    return [
        _under_the_name_of(source, was) if _is_moved(source, was, pin) else source
        for source, was, pin in zip(sources, old, pins, strict=True)
    ]


def _is_moved(source: Source, was: Source, pin: PinnedSource) -> bool:
    if source.path is None or was.path is None or source.path == was.path:
        return False
    # The content decides: the same file may have another name now.
    return fingerprint(source.path) == pin.fingerprint


def _under_the_name_of(source: Source, was: Source) -> Source:
    places.found(was.place, source.place, "data")
    return source.model_copy(update={"path": was.path})


def _sorted_out(earlier: Plan, recipe: Recipe) -> dict[str, list[str]]:
    """A line for every difference between a run's recipe and another, by what happens to it."""
    lines: dict[str, list[str]] = {"taken": [], "extended": [], "refused": []}
    for key, old, new in differences(earlier.recipe.model_dump(mode="json"), recipe.model_dump(mode="json")):
        result, rule = outcome(key, old, new), rule_of(key)
        reason = f" ({rule.why})" if result != rule.on_resume else ""
        lines[result].append(f"{key}: {old} -> {new}{reason}")
    return lines


def _with_length_of(earlier: Plan, loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe at the length that the run was planned with: what it trains on is compared before it is extended."""
    length = {name: getattr(earlier.recipe.train, name) for name in ("epochs", "steps")}
    train = loaded.recipe.train.model_copy(update=length)
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"train": train}))


def _recorded(path: Path) -> int:
    """The newest step that the run has a record of. A commit is one as well, should the journal have been cut."""
    committed = (checkpoint.step for checkpoint in Store(path).checkpoints())
    return max([0, *scan.read(path).steps, *committed])


def _is_as_extended(plan: Plan, schedule: str) -> bool:
    """Whether the run was last extended in this way: the command that did it may be repeated, as any other."""
    if not plan.segments:
        return False
    last = plan.segments[-1]
    return plan.schedule_start == (last.until if schedule == "restart" else last.schedule_start)


def _idle_schedule(path: Path, schedule: str, reason: str) -> RunError:
    return RunError(
        f"--schedule {schedule} has nothing to decide: {reason}",
        where=str(path),
        hint="raise train.epochs or train.steps to extend a run, or leave --schedule out",
    )
