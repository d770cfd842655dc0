"""One save, from live tensors to a commit that was read back, with what is kept and removed after it. For `recorder`.

`begin` is what training waits for; `commit` runs on the writer's thread, one save after the other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from finetune.errors import FinetuneError
from finetune.model.base import Companions
from finetune.plan.facts import Metrics
from finetune.plan.memory import staging_sets
from finetune.plan.plan import Plan
from finetune.store.checkpoints import pruning
from finetune.store.checkpoints.manifest import Checkpoint, Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.tensor_files import FROZEN, of_kind
from finetune.store.checkpoints.trainer_state import History
from finetune.store.checkpoints.verify import Damage, Verify, is_as_recorded
from finetune.store.durable import replace_file
from finetune.store.run import journal as journals
from finetune.store.run.journal import Journal
from finetune.store.run.lease import Lease
from finetune.store.run.records import AmendmentRecord, EventRecord, ParentRecord
from finetune.store.run.row_losses import Columns
from finetune.training.device import device
from finetune.training.saving import evaluated_rows
from finetune.training.saving import snapshot as snapshots
from finetune.training.saving.buffers import Staging
from finetune.training.saving.rank_reports import Report
from finetune.training.saving.room import is_passing, refuse_small
from finetune.training.saving.sharded import OtherRanks
from finetune.training.saving.snapshot import Snapshot
from finetune.training.state import TrainState


@dataclass(frozen=True)
class Record:
    """What a commit makes durable beside the state."""

    metrics: Metrics
    columns: Columns
    history: Callable[[], History]
    """Makes what `trainer_state.json` says."""
    evaluated: dict[int, Metrics]
    """Held-out figures of all steps, for retention."""
    newest_step: int
    """The newest step that the journal has, from an earlier attempt perhaps."""
    wait_seconds: float
    """How long training waited for earlier saves."""
    amendments: list[AmendmentRecord]
    """What was decided against the plan, up to this step."""


@dataclass(frozen=True)
class Save:
    snapshot: Snapshot
    record: Record
    began: float
    """On the clock `time.monotonic`."""
    call_seconds: float


class Saver:
    """The checkpoints of a run that is being trained; on rank 0 only."""

    def __init__(
        self,
        run: Path,
        plan: Plan,
        companions: Companions,
        manifest: Manifest,
        say: Callable[[str], None],
        state: TrainState,
    ):
        self.last: Checkpoint | None = None
        self.given_up: FinetuneError | None = None
        """Why the newest save was, if it was."""
        self._run = run
        self._plan = plan
        self._companions = companions
        self._manifest = manifest  # what is the same in all of this attempt
        self._say = say
        self._store = Store(run)
        self._live = snapshots.Live(state)
        self._staging = Staging()
        self.sets = staging_sets(plan, device())
        """Saves that may be under way at once: each has a copy of the state."""
        self._damaged: set[str] = set()
        self._left_over = Columns()  # of saves that were given up; the next one writes them

    def recover(self, verify: Verify) -> list[Damage]:
        """Finds the newest sound checkpoint, once what the base still has is restored; returns what is wrong with newer ones."""
        # First: it may put back the newest checkpoint.
        self._store.sweep()
        self.last, damages = self._store.newest_sound(verify=verify)
        if damages and self._restore():
            self.last, damages = self._store.newest_sound(verify=verify)
        self._damaged = {damage.file.partition("/")[0] for damage in damages}
        return damages

    def newest_before(self, step: int, verify: Verify) -> Checkpoint | None:
        """The newest full and sound checkpoint before a step."""
        return self._store.newest_sound(before=step, verify=verify)[0]

    def give_up(self, first: int, before: Checkpoint | None) -> None:
        """Removes the checkpoints from a step on; when no save is under way. `before` is the newest sound one that stays."""
        for checkpoint in self._store.checkpoints():
            if checkpoint.step >= first:
                self._store.remove(checkpoint)
        self.last, self._left_over = before, Columns()

    def pinned_after(self, step: int) -> list[int]:
        """The stored steps after one that have to stay: branches begin with them, or somebody asked for them."""
        stored = {checkpoint.step for checkpoint in self._store.checkpoints()}
        return sorted(each for each in self._store.pinned() & stored if each > step)

    def warm(self, state: TrainState) -> None:
        snapshots.warm(state, self._live, self._staging, self.sets)

    def begin(self, state: TrainState, record: Record) -> Save:
        started = time.monotonic()
        snapshot = snapshots.take(state, self._live, self._plan, self._staging)
        return Save(snapshot, record, started, time.monotonic() - started + record.wait_seconds)

    def commit(self, save: Save, journal: Journal, lease: Lease, report: Report | None) -> None:
        """Makes a save a checkpoint, reads it back and applies the keep rules. A save that finds no room or misses a rank's report
        is given up, loudly; other failures are raised."""
        step, columns = save.snapshot.step, self._left_over + save.record.columns
        self._left_over, self.given_up = Columns(), None
        ranks = OtherRanks(report, save.snapshot.bytes) if report and save.snapshot.rows else None
        try:
            if report:
                report.wait()
            with journal.saving(snapshots.stored_bytes(save.snapshot, self.last)):
                self._make_durable(save, columns, journal, lease, ranks)
        except FinetuneError as error:
            if not is_passing(error):
                raise
            # The columns go with the next save, so the record has no hole.
            self._left_over, self.given_up = columns, error
            self._say(f"save of step {step} skipped: {error.message}; training goes on")
            journal.append(self._event("skipped_save", step=step, message=error.message))
        else:
            self._say(f"committed step {step}")
            self._prune(save, journal, lease)
        finally:
            if ranks:
                ranks.end()
            save.snapshot.copy.release()

    def commit_kept(self, save: Save, journal: Journal, lease: Lease) -> None:
        """Makes a save a checkpoint, and applies no rule."""
        try:
            self._make_durable(save, save.record.columns, journal, lease)
        finally:
            save.snapshot.copy.release()

    def _make_durable(
        self, save: Save, columns: Columns, journal: Journal, lease: Lease, ranks: OtherRanks | None = None
    ) -> None:
        cpu_started, step = time.thread_time(), save.snapshot.step
        refuse_small(self._run, snapshots.stored_bytes(save.snapshot, self.last))
        # All before the checkpoint, so that none is ahead of its record.
        columns.write(self._run, self._manifest.attempt)
        journal.sync()
        attempt = self._store.begin(step, self._manifest.attempt, ranks)
        snapshots.write(save.snapshot, self._plan, self._companions, self.last, attempt)
        attempt.write_json("trainer_state.json", save.record.history())
        manifest = self._manifest_of(step, save.record)
        evaluated_rows.write(columns.evaluations, self._run, self._plan, manifest, attempt.files)
        committed = self._store.commit(attempt, manifest, lease.check)
        # The rename is on the disk: from here on a power cut loses nothing of this step.
        durable = time.monotonic()
        # Past the page cache: what the disk really has. A linked file was read back when it was written.
        self._store.read_back(committed, attempt.unread)
        self.last = committed
        self._damaged.discard(committed.path.name)
        figures = {
            "newest_step": save.record.newest_step,
            "bytes": attempt.written_bytes,
            "blocked_ms": round(1000 * (save.call_seconds + save.snapshot.copy.awaited_seconds), 3),
            "wait_seconds": round(save.record.wait_seconds, 3),
            "save_seconds": round(durable - save.began, 3),
            "read_back_seconds": round(time.monotonic() - durable, 3),
            "save_cpu_seconds": round(time.thread_time() - cpu_started, 3),
        }
        journal.append(self._event("committed", step=step, **figures))

    def _prune(self, save: Save, journal: Journal, lease: Lease) -> None:
        # Another process may have taken the run over, and resume from what would be removed here.
        lease.check()
        recipe = self._plan.recipe
        actions = pruning.due(self._store, recipe.checkpoint.keep, save.record.evaluated, self._damaged, recipe.publish)
        try:
            pruning.apply(self._store, actions, lambda name, at: journal.append(self._event(name, step=at)))
        except FinetuneError as error:
            if not is_passing(error):
                raise
            self._say(f"older checkpoints stay for now: {error}")

    def _manifest_of(self, step: int, record: Record) -> Manifest:
        last = self.last
        name = self._run.absolute().name
        parent: ParentRecord | None = {"ref": f"{name}@{last.step}", "digest": last.manifest.digest} if last else None
        return replace(
            self._manifest,
            step=step,
            parent=parent,
            metrics=record.metrics,
            amendments=record.amendments,
            created=journals.now(),
        )

    def _event(self, name: str, **figures: object) -> EventRecord:
        return journals.event(name, self._manifest.attempt, **figures)

    def _restore(self) -> bool:
        """Puts right what the base still has, where it is damaged: small files, and weights that cannot change. What is trained
        beside them need not be given up. Returns whether anything was."""
        restored = []
        small = self._companions.contents(with_config=True)
        digests = {name: f"blake3:{blake3(content).hexdigest()}" for name, content in small.items()}
        for checkpoint in self._store.checkpoints():
            for name, content in small.items():
                record, kept = checkpoint.manifest.files.get(name), checkpoint.path / name
                if record and record.digest == digests[name] and not is_as_recorded(kept, record):
                    replace_file(kept, content)
                    restored.append(kept)
            for name in of_kind(checkpoint.manifest.files, FROZEN):
                record, kept = checkpoint.manifest.files[name], checkpoint.path / name
                is_damaged = not is_as_recorded(kept, record)
                if is_damaged and not self._live.rows and snapshots.restore_frozen(self._live, kept, record):
                    restored.append(kept)
        for kept in restored:
            self._say(f"restored {kept.relative_to(self._run)} from the base")
        return bool(restored)
