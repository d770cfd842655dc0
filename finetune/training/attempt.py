"""An attempt at a run begins: its checkpoints are put right, all ranks agree on the newest, and the start is written down."""

from pathlib import Path
from typing import NamedTuple

from finetune.errors import RunError, counted
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint, Manifest, of_attempt
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import Damage
from finetune.store.durable import replace_file
from finetune.store.run import journal as journals
from finetune.store.run.directory import RunDirectory, step_of
from finetune.store.run.lease import Lease
from finetune.store.run.silence import Watch
from finetune.training import mirroring
from finetune.training.agreement import same_checkpoint, verified_together
from finetune.training.followers import Followers
from finetune.training.progress import Progress
from finetune.training.recorder import Pen, Recorder
from finetune.training.resume import Opened
from finetune.training.saving.rank_reports import Reports
from finetune.training.saving.saver import Saver
from finetune.training.saving.sharded import OwnRows
from finetune.training.so_far import Past
from finetune.training.state import TrainState


class Attempt(NamedTuple):
    recorder: Recorder
    checkpoint: Checkpoint | None
    """Where the run goes on; None at its start. The same on every rank."""


def begin(
    path: Path, opened: Opened, recipe_text: str, state: TrainState, progress: Progress, lease: Lease | None
) -> Attempt:
    """`lease` is None on ranks that write nothing. RunError where checkpoints of another run lie in this one's place."""
    plan, accelerator, several = opened.resolved.plan, state.accelerator, state.accelerator.num_processes > 1
    # Made by all ranks at the same point: the group's creation waits for every one.
    reports = Reports(accelerator.process_index, accelerator.num_processes) if several else None
    if lease is None:
        # The journal is read after rank 0 has put it right.
        with verified_together(path, state):
            pass
        checkpoint = same_checkpoint(None, path, state)
        own_rows = OwnRows(path, plan, state) if state.strategy.is_sharded else None
        recorder = Recorder(path, plan, progress, Past(path, plan, checkpoint), reports, own_rows=own_rows)
        return Attempt(recorder, checkpoint)
    refuse_strangers(path, plan, opened.facts["run"])
    manifest = of_attempt(opened.facts, plan.plan_id, lease.attempt)
    saver = Saver(path, plan, opened.resolved.companions, manifest, progress.say, state)
    with verified_together(path, state) as verify:
        # Damage is put right or passed over before anything else asks for the newest checkpoint.
        damages, past = saver.recover(verify), Past(path, plan, saver.last)
        # A rollback gave this checkpoint up, and a kill came before it was removed.
        while saver.last and past.is_abandoned:
            saver.give_up(saver.last.step, saver.newest_before(saver.last.step, verify))
            past = Past(path, plan, saver.last)
    run = RunDirectory(path)
    # The plan is written before the first step, so whatever a kill leaves can be resumed.
    replace_file(run.recipe, recipe_text.encode())
    replace_file(run.plan_file, plan.dump(opened.facts))
    journal = journals.Journal(path, Watch(path))
    mirroring.claim(path)
    pen = Pen(lease, journal, saver, Followers(path, plan.recipe, progress.say))
    recorder = Recorder(path, plan, progress, past, reports, pen)
    _write_down(recorder, lease, manifest, opened.changes, saver.last, damages)
    _say_what_is_lost(recorder, past, damages)
    return Attempt(recorder, same_checkpoint(saver.last, path, state))


def refuse_strangers(path: Path, plan: Plan, run: str) -> None:
    """RunError for a checkpoint of another run or plan: it would be taken for a step of this one."""
    for checkpoint in Store(path).checkpoints():
        manifest = checkpoint.manifest
        if manifest.run != run or manifest.plan_id not in plan.plan_ids:
            raise RunError(
                "belongs to another run or plan",
                where=str(checkpoint.path),
                hint="move it away, or use another --run",
            )


def _write_down(
    recorder: Recorder,
    lease: Lease,
    manifest: Manifest,
    changes: list[str],
    last: Checkpoint | None,
    damages: list[Damage],
) -> None:
    plan = recorder.plan
    previous = str(lease.previous) if lease.previous else None  # a holder that died
    facts = {"plan_id": plan.plan_id, "changes": changes, "world": manifest.world, "previous": previous}
    recorder.event("started", step=recorder.last_step, **facts)
    is_known = last is not None and last.manifest.plan_id == plan.plan_id  # an attempt before said so
    if plan.extension and not is_known and plan.extension["plan_id"] not in recorder.past.extended:
        recorder.event("extended", **plan.extension)
    for damage in damages:
        recorder.event("damaged", check=damage.check, file=damage.file, tensor=damage.tensor, message=damage.message)


def _say_what_is_lost(recorder: Recorder, past: Past, damages: list[Damage]) -> None:
    say, step = recorder.progress.say, recorder.last_step
    for damage in damages:
        say(f"damaged: {damage.file}: {damage.message}")
    if damages:
        lost = max(step_of(damage.file.partition("/")[0]) or 0 for damage in damages) - step
        say(f"falling back to step {step}: re-running {counted(lost, 'step')}")
    elif past.newest_committed > step:
        lost = past.newest_committed - step
        say(f"step {past.newest_committed} was committed and is gone: re-running {counted(lost, 'step')}")
