"""Writes a run directory. Rank 0 writes, and the others' recorders only report to it: what a rank does never depends on its number."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from finetune.errors import CheckpointError
from finetune.plan import metrics as names
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.verify import Verify
from finetune.store.evaluations import Evaluation
from finetune.store.run import journal as journals
from finetune.store.run.lease import Lease
from finetune.store.run.records import Skipped, StepRecord
from finetune.store.run.row_losses import Columns
from finetune.training import collectives
from finetune.training.followers import Followers
from finetune.training.guard import Amendment, Verdict
from finetune.training.loop import StepReport
from finetune.training.progress import Progress
from finetune.training.saving.rank_reports import Reports
from finetune.training.saving.saver import Record, Saver
from finetune.training.saving.sharded import OwnRows, work_beside
from finetune.training.saving.writer import Writer
from finetune.training.so_far import Past
from finetune.training.state import TrainState
from finetune.training.used_memory import used_bytes


class Pen(NamedTuple):
    """What the rank that writes has beside the others."""

    lease: Lease
    journal: journals.Journal
    saver: Saver
    followers: Followers


class Recorder:
    """One attempt at a run. `pen` is None on ranks that write nothing, `reports` where there is one rank."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        progress: Progress,
        past: Past,
        reports: Reports | None = None,
        pen: Pen | None = None,
        own_rows: OwnRows | None = None,
    ):
        self.path = path
        self.plan = plan
        self.progress = progress
        self.past = past
        self.reports = reports
        self.pen = pen
        self.own_rows = own_rows
        """On ranks that write no journal, and rows of checkpoints."""
        self.committed_at = time.monotonic()
        self.last_step = past.step
        """The newest step that is committed, or is being committed."""
        self._attempt = pen.lease.attempt if pen else ""
        self._writer = Writer(saving.sets) if (saving := pen.saver if pen else own_rows) else Writer()
        self._said_stalled: int | None = None
        self._columns = Columns()

    @property
    def is_writer(self) -> bool:
        return self.pen is not None

    def recall(self, last: Checkpoint) -> None:
        """Takes up the past of the run, up to a checkpoint that it goes back to, on every rank."""
        self.past = Past(self.path, self.plan, last)
        self.last_step = last.step

    def event(self, name: str, **figures: object) -> None:
        if self.pen:
            self.pen.journal.append(journals.event(name, self._attempt, **figures))

    def warm(self, state: TrainState) -> None:
        """Makes the memory ready that saves are copied to; after the first step, when all of the state is there."""
        if saving := self.pen.saver if self.pen else self.own_rows:
            saving.warm(state)

    def step(self, report: StepReport) -> None:
        """Appends a step to the journal. A step that ran before must give the same figures, or the run says so at once.

        Raises what went wrong in a save meanwhile.
        """
        record = self._record_of(report)
        self._check_saves()
        # Another process may have taken the run over: then nothing more may be written.
        if self.pen:
            self.pen.lease.check()
            # After a kill, steps run again. They must give the same figures, or the resume was not exact.
        earlier = self.past.earlier(report.step)
        self.past.add(record)
        if self.pen:
            self.pen.journal.append(record)
            self.pen.followers.look()
            # Written with the next save: a file a step would be thousands of files.
            self._columns.extend(report.columns)
            if earlier and (changed := journals.difference(earlier, record)):
                was = f"{changed} was {earlier.get(changed)!r} and is {record.get(changed)!r}"
                self.progress.say(f"step {report.step} ran before and is not the same: {was}; exactness is lost")
                self.event("not_exact", step=report.step, quantity=changed)
        self.progress.step(
            report.step, report.loss, report.learning_rate, report.grad_norm, report.tokens, report.seconds
        )

    def _record_of(self, report: StepReport) -> StepRecord:
        verdict = report.verdict
        skipped: Skipped = {"skipped": verdict.reason} if verdict and verdict.is_refused else {}
        return {
            "kind": "step",
            "step": report.step,
            **report.figures,
            **skipped,
            "seconds": round(report.seconds, 6),
            "await_seconds": round(report.await_seconds, 6),
            "memory_bytes": used_bytes(),
            "attempt": self._attempt,
            "time": journals.now(),
        }

    @property
    def amendments(self) -> list[Amendment]:
        """The steps that the guard skips, as decided so far."""
        return self.past.amendments

    def amend(self, amendment: Amendment, report: StepReport, verdict: Verdict) -> None:
        """A step is skipped; before its record."""
        self.past.amend(amendment)
        self._say_amendment(amendment, report, verdict)

    def before(self, amendment: Amendment, verify: Verify) -> Checkpoint | None:
        """The newest sound checkpoint that is not changed by a rollback, on rank 0, when all saves have ended."""
        # Saves under way may end with a newer checkpoint than is there now.
        self._writer.finish()
        if not self.pen:
            return None
        checkpoint = self.pen.saver.newest_before(amendment.first, verify)
        if checkpoint is None:
            self.progress.say(f"no checkpoint before step {amendment.first} to roll back to")
        elif pinned := self.pen.saver.pinned_after(checkpoint.step):
            self.progress.say(f"no rollback to step {checkpoint.step}: step {pinned[0]} is pinned, and has to stay")
            return None
        return checkpoint

    def roll_back(self, amendment: Amendment, report: StepReport, verdict: Verdict, checkpoint: Checkpoint) -> None:
        """The run goes on from a checkpoint. In this order: what is removed is known to be given up, whatever happens in between."""
        if not self.pen:
            return
        self._columns.write(self.path, self._attempt)
        self._columns = Columns()
        self._say_amendment(amendment, report, verdict, to=checkpoint.step)
        # Durable before anything is removed: a resume then knows that these checkpoints were given up.
        self.pen.journal.sync()
        self.pen.saver.give_up(checkpoint.step + 1, checkpoint)

    def _say_amendment(self, amendment: Amendment, report: StepReport, verdict: Verdict, **more: object) -> None:
        about = {"quantity": verdict.quantity, "message": verdict.message, **report.figures}
        self.event("amended", **amendment.record, **more, **about)
        skipped = (
            f"step {amendment.first}"
            if amendment.first == amendment.last
            else f"steps {amendment.first} to {amendment.last}"
        )
        back = f"back to step {more['to']}, " if more else ""
        self.progress.say(f"{verdict.reason} at step {report.step}: {verdict.message}; {back}{skipped} skipped")

    def _check_saves(self) -> None:
        stalled = self._writer.check()
        if stalled not in (None, self._said_stalled):
            self._said_stalled = stalled
            self.progress.say(f"the save of step {stalled} takes too long: does the disk hang? Training goes on")
            self.event("stalled_save", step=stalled)

    def evaluated(self, step: int, metrics: Metrics, by_row: Sequence[Evaluation]) -> None:
        """Records the held-out figures of a step, and those of each row with the next save."""
        self.past.evaluated[step] = metrics
        self.event("evaluated", step=step, **metrics)
        if self.pen:
            self._columns.evaluations.extend(by_row)
        self.progress.say(names.told(step, metrics))

    def is_evaluated(self, step: int) -> bool:
        return step in self.past.evaluated

    @property
    def evaluations(self) -> dict[int, Metrics]:
        """The held-out figures so far, by step; on every rank the same."""
        return self.past.evaluated

    def window(self, quantity: str, before: int) -> list[float]:
        """A recorded quantity in the steps before a step, as many as `guard` looks back on."""
        return self.past.window(quantity, before)

    def is_save_due(self) -> bool:
        """Whether a cadence of minutes has come round, on the clock of the rank that writes."""
        minutes = [every.minutes for every in self.plan.recipe.checkpoint.every if every.minutes]
        # One rank's clock decides: clocks differ, and the ranks agree in the next step.
        return self.is_writer and any(time.monotonic() - self.committed_at >= 60 * limit for limit in minutes)

    def commit(self, state: TrainState) -> None:
        """Begins to make the state a checkpoint and returns; the rest happens beside training, one save after the other.

        Waits only where two saves are under way. A save that failed is raised here, by `step` or by `finish`.
        """
        # Before the wait: ranks that write nothing have room at once, and their reports time out.
        report = self.reports.begin(state.step, self.plan.plan_id) if self.reports else None
        waited = self._writer.make_room()
        # Not in the next step, whose collectives give up on a slow disk.
        collectives.wait_for_everyone(state.accelerator)
        self.committed_at = time.monotonic()
        self.last_step = step = state.step
        if not self.pen:
            self._writer.submit(step, *work_beside(self.own_rows, state, report))
            return
        # Taken off now: the next step adds to new ones while the save's thread writes these.
        columns, self._columns = self._columns, Columns()
        history, evaluated = self.past.trainer_state(step), dict(self.past.evaluated)
        amendments = [each.record for each in self.amendments if each.first <= step]
        record = Record(evaluated.get(step, {}), columns, history, evaluated, self.past.newest_step, waited, amendments)
        lease, journal, saver, _ = self.pen
        save = saver.begin(state, record)
        self._writer.submit(step, save.snapshot.bytes, partial(saver.commit, save, journal, lease, report))

    def finish(self, state: TrainState) -> None:
        """Returns when everything that was begun is durable; raises why, where the last save was given up."""
        state.await_snapshot()
        self._writer.finish()
        if self.pen and (why := self.pen.saver.given_up):
            hint = why.hint or "run the same command again; it resumes from the commit before"
            raise CheckpointError(f"the last step is not committed: {why.message}", where=str(self.path), hint=hint)

    def close(self) -> None:
        self._writer.close()
        if self.reports:
            self.reports.close()
        if self.pen:
            try:
                self.pen.journal.close()
            finally:  # they read what it has written
                self.pen.followers.finish()
