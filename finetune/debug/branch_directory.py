"""The directory of a branch: a linked checkpoint, the records up to it, and last its plan.

Without the plan there is no run, and the same command starts again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from finetune.errors import RunError
from finetune.plan.facts import Facts
from finetune.plan.plan import Parent, Plan, are_same_rows
from finetune.recipe.load import dumps
from finetune.recipe.schema import Recipe
from finetune.store.checkpoints.manifest import Checkpoint, of_attempt
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.tensor_files import EMA, OPTIMIZER, is_for_resume, kind_of
from finetune.store.checkpoints.trainer_state import HISTORY, without_evaluations
from finetune.store.durable import failures, replace_file
from finetune.store.run import journal, scan
from finetune.store.run.directory import RunDirectory
from finetune.store.run.lease import Lease
from finetune.store.run.records import ParentRecord, Record
from finetune.training import pins


@dataclass(frozen=True)
class Branch:
    """The content of the directory. Without a checkpoint the branch begins at the base."""

    path: Path
    origin: Path
    plan: Plan
    facts: Facts
    recipe: Recipe
    checkpoint: Checkpoint | None
    is_optimizer_reset: bool

    @property
    def parent(self) -> Parent:
        if self.plan.parent is None:
            raise ValueError("the plan is not that of a branch")
        return self.plan.parent

    @cached_property
    def is_comparable(self) -> bool:
        """Whether the held-out figures of both runs are about the same examples."""
        return are_same_rows(self.plan, RunDirectory(self.origin).plan()[0])


def is_there(run: Path, plan: Plan) -> bool:
    """Whether the same command made the branch before. Raises RunError if there is another run."""
    if not RunDirectory(run).is_run:
        return False
    if plan.plan_id in RunDirectory(run).plan()[0].plan_ids:
        return True
    raise RunError("is another run", where=str(run), hint="use another --run")


def make(branch: Branch, held: Lease) -> list[str]:
    """Makes the directory; a line reports it if the parent run is not writable. Raises RunError if the directory has checkpoints of
    another run."""
    run, plan, lines = branch.path, branch.plan, []
    parent = branch.parent
    store, ours = Store(run), {"ref": parent.ref, "digest": parent.digest}
    for left in store.checkpoints():  # of a branch whose making was interrupted
        if left.manifest.parent != ours:
            hint = "use another --run; if it is a run that lost its plan.json, restore that"
            raise RunError("has checkpoints of something else", where=str(run), hint=hint)
        store.remove(left)
    if branch.checkpoint:
        lines = pins.pin(branch.origin, branch.checkpoint.step, f"branch-{branch.facts['run']}", parent.ref)
        store.pin(branch.checkpoint.step, "begin")  # replays of the branch start from here
        _link(branch, branch.checkpoint, store, held)
    RunDirectory(run).journal.unlink(missing_ok=True)
    writer = journal.Journal(run)
    for record in _past_of(branch):
        writer.append(record)
    about = parent.model_dump(mode="json", exclude={"step"})
    writer.append(journal.event("branched", held.attempt, step=parent.step, **about))
    writer.sync()
    writer.close()
    with failures(run, RunError):
        replace_file(RunDirectory(run).recipe, dumps(branch.recipe).encode())
        replace_file(RunDirectory(run).plan_file, plan.dump(branch.facts))
    return lines


def _link(branch: Branch, checkpoint: Checkpoint, store: Store, held: Lease) -> None:
    """The first checkpoint of the branch: without the optimizer if it is reset, and without held-out figures if other rows are held
    out."""
    plan = branch.plan
    attempt = store.begin(checkpoint.step, held.attempt)
    left_out = {*(() if branch.is_comparable else (HISTORY,)), *(() if plan.recipe.train.ema else (EMA,))}
    for name, record in checkpoint.manifest.files.items():
        if kind_of(name) not in left_out and not (branch.is_optimizer_reset and is_for_resume(name)):
            attempt.link(name, checkpoint.path / name, record)
    if not branch.is_comparable and HISTORY in checkpoint.manifest.files:
        history = json.loads((checkpoint.path / HISTORY).read_bytes())
        attempt.write_json(HISTORY, without_evaluations(history))
    if branch.is_optimizer_reset:
        attempt.write_tensors(OPTIMIZER, [], {})
        optimizer, scalars = plan.recipe.optimizer.name, dict[str, float]()
        attempt.write_json("state.json", {"step": checkpoint.step, "optimizer": optimizer, "scalars": scalars})
    parent: ParentRecord = {"ref": branch.parent.ref, "digest": checkpoint.manifest.digest}
    manifest = replace(
        of_attempt(branch.facts, plan.plan_id, held.attempt, checkpoint.step, parent),
        amendments=checkpoint.manifest.amendments,
        metrics=checkpoint.manifest.metrics if branch.is_comparable else {},
        created=journal.now(),
    )
    store.commit(attempt, manifest, held.check)


def _past_of(branch: Branch) -> Iterator[Record]:
    """The records of earlier steps, for the guard and the loss curve, and the evaluations."""
    (events, trained), step = scan.read(branch.origin), branch.parent.step
    yield from (trained[number] for number in sorted(trained) if number <= step)
    if branch.is_comparable:
        evaluated = journal.that_count(events, lambda record: record["event"] == "evaluated")
        yield from (record for number, record in sorted(evaluated.items()) if number <= step)
