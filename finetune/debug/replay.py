"""Runs steps of a run again, compares them with their record, shows their content, and commits the state after any of them.

`materialize` must not commit a state if a step on the way differs from its record.
"""

import secrets
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from finetune.debug import inspection
from finetune.debug.against_record import Difference
from finetune.debug.inspection import Inspection
from finetune.debug.reexecute import Rerun
from finetune.errors import CheckpointError, RunError, counted
from finetune.store.checkpoints.manifest import of_attempt
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal as journals
from finetune.store.run import lease
from finetune.store.run.lease import Lease
from finetune.store.run.row_losses import Columns
from finetune.training import collectives
from finetune.training.saving.saver import Record, Saver
from finetune.training.so_far import Past


class DifferenceRecord(TypedDict):
    step: int
    quantity: str
    recorded: object
    replayed: object


class Replay(TypedDict):
    """What `replay --json` prints."""

    steps: list[int]
    identical: bool
    first_difference: DifferenceRecord | None
    notes: list[str]
    inspected: NotRequired[list[Inspection]]
    materialized: NotRequired[list[str]]
    """Refs of the checkpoints that were made."""


def replay(run: Path, first: int, last: int, is_inspected: bool = False, is_materialized: bool = False) -> Replay:
    """The object of `replay --json`. Raises RunError if the run has no such steps."""
    rerun = Rerun(run)
    _refuse_missing(rerun, first, last)
    for note in rerun.notes():
        rerun.say(note)
    rerun.go_to(first - 1, rerun.say)
    inspected = []
    while rerun.state.step < last:
        if is_inspected:
            with inspection.watched(rerun.state) as seen:
                report = rerun.attempt()
            slots = rerun.slots_of(report.step)
            inspected.append(inspection.described(rerun.resolved, report, seen, slots))
        else:
            report = rerun.attempt()
        if not report.is_finished:  # as in the run: it has no state after this step
            break
        rerun.first_difference = rerun.first_difference or rerun.stored_difference()
    found = rerun.first_difference
    facts: Replay = {
        "steps": [first, last],
        "identical": found is None,
        "first_difference": cast(DifferenceRecord, asdict(found)) if found else None,
        "notes": rerun.notes(),
    }
    if is_inspected:
        facts["inspected"] = inspected
    if is_materialized:
        facts["materialized"] = materialize(rerun, range(first, last + 1))
    return facts


def materialize(rerun: Rerun, steps: Sequence[int]) -> list[str]:
    """Commits the states of steps as checkpoints of the run, and pins them: the keep rules leave them alone. Returns their refs.

    Raises CheckpointError if a step on the way differs from its record: the state would differ too.
    """
    if missing := sorted(set(steps) - rerun.steps.keys()):
        newest = max(rerun.steps, default=0)
        hint = f"the newest recorded step is {newest}" if newest else "the run has no step yet"
        raise CheckpointError(f"step {missing[0]} was never made", where=str(rerun.run), hint=hint)
    holding = lease.acquire(rerun.run, secrets.token_hex(4)) if rerun.accelerator.is_main_process else nullcontext()
    with holding as held:
        committer = Committer(rerun, held) if held else None
        for step in sorted(steps):
            rerun.go_to(step, rerun.say)
            if rerun.first_difference:
                hint = "the run was made by other code, data or hardware; `finetune replay` says more"
                message = f"{rerun.first_difference}, so what comes out is not the state of step {step}"
                raise CheckpointError(message, where=str(rerun.run), hint=hint)
            if committer:
                committer.commit(step)
        collectives.wait_for_everyone(rerun.accelerator)
        if committer:
            committer.close()
    return [f"{rerun.run}@{step}" for step in sorted(steps)]


class Committer:
    """Commits states of a rerun as checkpoints of its run, as its training would; on rank 0."""

    def __init__(self, rerun: Rerun, held: Lease):
        self._rerun, self._lease = rerun, held
        self._journal = journals.Journal(rerun.run)
        self._manifest = of_attempt(rerun.facts, rerun.plan.plan_id, held.attempt)
        self._saver: Saver | None = None

    def commit(self, step: int) -> None:
        rerun = self._rerun
        if self._saver is None:
            about = rerun.run, rerun.plan, rerun.resolved.companions
            self._saver = Saver(*about, self._manifest, rerun.say, rerun.whole_state)
            self._saver.recover(verify)
        before, _ = rerun.store.newest_sound(before=step + 1)  # `nearest` asks all ranks
        if before and before.step == step:  # it is stored already
            rerun.store.pin(step, "materialized")
            return
        self._saver.last = before
        past = Past(rerun.run, rerun.plan, before)
        for number in range((before.step if before else 0) + 1, step + 1):
            past.add(rerun.steps[number])
        evaluated = {at: metrics for at, metrics in past.evaluated.items() if at <= step}
        amendments = [each.record for each in rerun.amendments if each.first <= step]
        record = Record(
            metrics=evaluated.get(step, {}),
            columns=self._unwritten(step),
            history=past.trainer_state(step),
            evaluated=evaluated,
            newest_step=max(rerun.steps),
            wait_seconds=0.0,
            amendments=amendments,
        )
        rerun.store.pin(step, "materialized")  # before the commit: the next training's keep rules must not remove it
        save = self._saver.begin(rerun.state, record)
        self._saver.commit_kept(save, self._journal, self._lease)

    def _unwritten(self, step: int) -> Columns:
        """Row losses and norms of steps up to this one that a killed run did not write: no checkpoint is ahead of its record."""
        found = Columns()
        for number in sorted(number for number in self._rerun.unwritten if number <= step):
            found.extend(self._rerun.unwritten.pop(number))
        return found

    def close(self) -> None:
        self._journal.close()


def _refuse_missing(rerun: Rerun, first: int, last: int) -> None:
    """The recorded steps, and a refused last one."""
    newest = max(rerun.steps, default=0)
    refused = {record["step"] for record in rerun.events if record["event"] in ("not_finite", "spike")}
    if last > max([newest, *refused]):
        raise RunError(f"has {counted(newest, 'step')}", where=str(rerun.run), hint=f"name steps from 1 to {newest}")
    if rerun.plan.parent and first <= rerun.plan.parent.step:
        hint = f"replay the run it comes from, {rerun.plan.parent.ref}"
        raise RunError(f"begins with step {rerun.plan.parent.step + 1}", where=str(rerun.run), hint=hint)


def listing(facts: Replay) -> str:
    """The same as lines of text."""
    first, last = facts["steps"]
    what = f"step {first}" if first == last else f"steps {first} to {last}"
    lines = [inspection.listing(step) for step in facts.get("inspected", ())]
    if found := facts["first_difference"]:
        lines.append(f"not as recorded: {Difference(**found)}")
    else:
        lines.append(f"{what}: as recorded, to the bit")
    lines += [f"committed {ref}" for ref in facts.get("materialized", ())]
    return "\n".join(lines)
