"""Retention on the disk: demotes, then removes, checkpoints that the keep rules do not keep."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, TypedDict

from finetune.errors import CheckpointError
from finetune.plan.facts import Metrics
from finetune.plan.retention import Saved, keep
from finetune.recipe.schema import Keep, Publish
from finetune.store.checkpoints import best
from finetune.store.checkpoints.manifest import read
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.stored import Summary
from finetune.store.checkpoints.tensor_files import is_for_resume
from finetune.store.run import journal as journals
from finetune.store.run import lease, scan
from finetune.store.run.directory import RunDirectory


class Action(TypedDict):
    ref: str
    step: int
    action: str
    """`demote` or `remove`."""
    bytes: int
    """Bytes it frees."""


class PinnedStep(TypedDict):
    ref: str
    step: int
    pins: list[str]
    """The files in `pins/` for it."""


class Pruned(NamedTuple):
    actions: list[Action]
    pinned: list[PinnedStep]
    """Steps that would go without their pins."""


def prune(run: Path, changes: dict[str, int | None], is_dry_run: bool) -> Pruned:
    """Applies the run's keep rules by hand, changed by those of `changes` that are not None; a dry run only reports.

    The newest sound checkpoint always stays. Damaged ones do not count, and stay for you to inspect.
    """
    plan, _ = RunDirectory(run).plan()
    cadences = {"every", "weights_every"}
    given: dict[str, object] = {
        name: f"{value} steps" if name in cadences else value for name, value in changes.items() if value is not None
    }
    if "best" in given:  # as many by the run's own figure
        given["best"] = plan.recipe.checkpoint.keep.chosen_by.model_copy(update={"count": given["best"]})
    rule = Keep.model_validate(plan.recipe.checkpoint.keep.model_dump() | given)
    with lease.acquire(run, "prune"):
        store = Store(run)
        newest, damages = store.newest_sound()
        if newest is None:
            raise CheckpointError("has no sound checkpoint, so nothing is removed", where=str(run))
        damaged = {damage.file.partition("/")[0] for damage in damages}
        evaluated = journals.evaluations(scan.events(run))
        rules, pins = (store, rule, evaluated, damaged, plan.recipe.publish), RunDirectory(run).pinned()
        actions = due(*rules)
        held = {item.step for item, _ in due(*rules, are_pins_kept=False)} & pins.keys()
        facts: list[Action] = [
            {"ref": f"{run}@{item.step}", "step": item.step, "action": action, "bytes": _freed(item, action)}
            for item, action in actions
        ]
        if not is_dry_run:
            journal = journals.Journal(run)
            apply(store, actions, lambda name, step: journal.append(journals.event(name, "prune", step=step)))
            journal.close()
    return Pruned(facts, [{"ref": f"{run}@{step}", "step": step, "pins": pins[step]} for step in sorted(held)])


def due(
    store: Store,
    rule: Keep,
    evaluated: dict[int, Metrics],
    damaged: Collection[str],
    publish: Publish | None = None,
    are_pins_kept: bool = True,
) -> list[tuple[Summary, str]]:
    """Actions on checkpoints that the rules do not keep, oldest first, demotions before removals. Directories in `damaged` do not
    count. Pinned checkpoints stay, and so do milestones, published or not yet, and what `@best` names."""
    sound = [item for item in store.summaries() if item.path.name not in damaged]
    saved = [Saved.of(item, evaluated, rule.chosen_by) for item in sound]
    cadence = publish.milestones.steps if publish and publish.milestones else None
    milestones = {item.step for item in sound if cadence and item.step % cadence == 0}
    # the lowest loss stays by the rules
    chosen = best.chosen(store.run, saved, evaluated)
    named = {chosen.step} if chosen else set()
    kept = keep(saved, rule, protected=milestones | named | (store.pinned() if are_pins_kept else set()))
    demoted = [item for item in sound if item.step in kept.weights and item.kind == "full"]
    removed = [item for item in sound if item.step not in kept.full | kept.weights]
    return [(item, "demote") for item in demoted] + [(item, "remove") for item in removed]


def apply(store: Store, actions: list[tuple[Summary, str]], record: Callable[[str, int], None]) -> None:
    """Carries out the actions of `due`; `record` gets each event afterwards."""
    for item, action in actions:
        if action == "demote":
            store.demote(read(item.path))
        else:
            store.remove(item)
        record(f"{action}d", item.step)


def _freed(checkpoint: Summary, action: str) -> int:
    files = [path for path in checkpoint.path.iterdir() if action == "remove" or is_for_resume(path.name)]
    return sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)  # linked ones live on elsewhere
