"""A run directory that is being written: plan, journal, row losses, checkpoints. `run` tells it what happened.

Rank 0 writes; the others' recorders only report to it, so that what a rank does never depends on which one it is.
"""

import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from finetune.errors import CheckpointError, RunError, counted
from finetune.model.base import Companions
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint, Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import Damage
from finetune.store.durable import replace_file
from finetune.store.run import journal as journals
from finetune.store.run.directory import RunDirectory, step_of
from finetune.store.run.lease import Lease
from finetune.store.run.row_losses import Columns, ModuleNorms, RowLoss
from finetune.training import collectives
from finetune.training.guard import Amendment
from finetune.training.loop import StepReport
from finetune.training.progress import Progress
from finetune.training.resume import WORLD
from finetune.training.saving.rank_reports import MissingReport, Report, Reports
from finetune.training.saving.saver import Record, Saver
from finetune.training.saving.writer import Writer
from finetune.training.so_far import Past
from finetune.training.state import TrainState


class Recorder:
    """One attempt at a run. `lease` is None on ranks that write nothing."""

    def __init__(self, path: Path, plan: Plan, facts: dict, progress: Progress, lease: Lease | None):
        self.path = path
        self.plan = plan
        self.progress = progress
        self.is_writer = lease is not None
        self.committed_at = time.monotonic()
        self.last_step = 0
        """The newest step that is committed, or is being committed."""
        self.reports: Reports | None = None
        """Set where there are several ranks."""
        self._facts = facts
        self._lease = lease
        self._journal: journals.Journal | None = None
        self._attempt = lease.attempt if lease else ""
        self._writer = Writer()
        self._said_stalled: int | None = None
        self._columns = Columns()

    def open(
        self, recipe_text: str, companions: Companions, state: TrainState, changes: list[str]
    ) -> Checkpoint | None:
        """Writes down what is about to happen; returns the newest sound checkpoint, and says what is wrong with newer ones."""
        self._refuse_strangers()
        manifest = Manifest(
            run=self._facts["run"],
            attempt=self._attempt,
            step=0,
            parent=None,
            plan_id=self.plan.plan_id,
            versions=self._facts["versions"],
            world=self._world(),
        )
        self._saver = Saver(self.path, self.plan, companions, manifest, self.progress.say)
        self._writer.in_flight = self._saver.sets
        damages = self._saver.open(state)
        self.recall(self._saver.last)
        while self._past.is_abandoned:  # a rollback gave it up, and was cut off before it was removed
            self._saver.give_up(self._saver.last.step)
            self.recall(self._saver.last)
        last = self._saver.last
        replace_file(RunDirectory(self.path).recipe, recipe_text.encode())
        replace_file(RunDirectory(self.path).plan_file, self.plan.dump(self._facts))
        self._journal = journals.Journal(self.path)
        previous = str(self._lease.previous) if self._lease.previous else None  # a holder that died
        facts = {"plan_id": self.plan.plan_id, "changes": changes, "world": self._world(), "previous": previous}
        self.event("started", step=self.last_step, **facts)
        extension = self.plan.extension
        is_known = last is not None and last.manifest.plan_id == self.plan.plan_id  # an attempt before said so
        if extension and not is_known and extension["plan_id"] not in self._past.extended:
            self.event("extended", **extension)
        for damage in damages:
            self.event("damaged", check=damage.check, file=damage.file, tensor=damage.tensor, message=damage.message)
        self._say_what_is_lost(damages)
        return last

    def recall(self, last: Checkpoint | None) -> None:
        """Takes up the past of the run, up to the checkpoint that it goes on from, on every rank."""
        self._past = Past(self.path, self.plan, last)
        self.last_step = last.step if last else 0

    def _refuse_strangers(self) -> None:
        """A checkpoint of another run or plan would be taken for a step of this one."""
        own = self.plan.plan_ids
        for checkpoint in Store(self.path).checkpoints():
            manifest = checkpoint.manifest
            if manifest.run != self._facts["run"] or manifest.plan_id not in own:
                raise RunError(
                    "belongs to another run or plan",
                    where=str(checkpoint.path),
                    hint="move it away, or use another --run",
                )

    def _say_what_is_lost(self, damages: list[Damage]) -> None:
        for damage in damages:
            self.progress.say(f"damaged: {damage.file}: {damage.message}")
        if damages:
            lost = max(step_of(damage.file.partition("/")[0]) for damage in damages) - self.last_step
            self.progress.say(f"falling back to step {self.last_step}: re-running {counted(lost, 'step')}")
        elif self._past.newest_committed > self.last_step:
            newest = self._past.newest_committed
            lost = newest - self.last_step
            self.progress.say(f"step {newest} was committed and is gone: re-running {counted(lost, 'step')}")

    def event(self, name: str, **figures: object) -> None:
        if self.is_writer:
            self._journal.append(journals.event(name, self._attempt, **figures))

    def warm(self, state: TrainState) -> None:
        """Makes the memory ready that saves are copied to; after the first step, when all of the state is there."""
        if self.is_writer:
            self._saver.warm(state)

    def step(self, report: StepReport) -> None:
        """Appends a step to the journal. A step that ran before must give the same figures, or the run says so at once.

        Raises what went wrong in a save meanwhile.
        """
        record = {"kind": "step", "step": report.step, **figures_of(report)}
        if report.verdict and report.verdict.is_refused:
            record["skipped"] = report.verdict.reason
        record |= {"seconds": round(report.seconds, 6), "await_seconds": round(report.await_seconds, 6)}
        record |= {"attempt": self._attempt, "time": journals.now()}
        self._check_saves()
        if self._lease:
            self._lease.check()
        earlier = self._past.earlier(report.step)
        self._past.add(record)
        if self.is_writer:
            self._journal.append(record)
            self._columns.extend(columns_of(report))
            changed = journals.difference(earlier, record) if earlier else None
            if changed:
                was = f"{changed} was {earlier.get(changed)!r} and is {record.get(changed)!r}"
                self.progress.say(f"step {report.step} ran before and is not the same: {was}; exactness is lost")
                self.event("not_exact", step=report.step, quantity=changed)
        self.progress.step(
            report.step, report.loss, report.learning_rate, report.grad_norm, report.tokens, report.seconds
        )

    @property
    def amendments(self) -> list[Amendment]:
        """The steps that are left out, as was decided so far."""
        return self._past.amendments

    def amend(self, amendment: Amendment, report: StepReport) -> None:
        """A step is left out; before its record."""
        self._past.amend(amendment)
        self._say_amendment(amendment, report)

    def spike(self, report: StepReport) -> None:
        """A step that is made, and is far from those before it."""
        verdict = report.verdict
        self.progress.say(f"spike at step {report.step}: {verdict.message}")
        self.event("spike", step=report.step, quantity=verdict.quantity, message=verdict.message)

    def refused(self, report: StepReport) -> None:
        """A step that was not made, and ends the run."""
        verdict = report.verdict
        about = {"quantity": verdict.quantity, "message": verdict.message}
        self.event(verdict.reason, step=report.step, **about, **figures_of(report))

    def before(self, amendment: Amendment) -> Checkpoint | None:
        """The newest sound checkpoint that is not changed by a rollback, on rank 0, when all saves have ended."""
        self._writer.finish()
        if not self.is_writer:
            return None
        checkpoint = self._saver.newest_before(amendment.first)
        if checkpoint is None:
            self.progress.say(f"no checkpoint before step {amendment.first} to roll back to")
        elif pinned := self._saver.pinned_after(checkpoint.step):
            self.progress.say(f"no rollback to step {checkpoint.step}: step {pinned[0]} is pinned, and has to stay")
            return None
        return checkpoint

    def roll_back(self, amendment: Amendment, report: StepReport, checkpoint: Checkpoint) -> None:
        """The run goes on from a checkpoint. In this order: what is removed is known to be given up, whatever happens in between."""
        if not self.is_writer:
            return
        self._columns.write(self.path, self._attempt)
        self._columns = Columns()
        self._say_amendment(amendment, report, to=checkpoint.step)
        self._journal.sync()
        self._saver.give_up(checkpoint.step + 1)

    def _say_amendment(self, amendment: Amendment, report: StepReport, **more: object) -> None:
        verdict = report.verdict
        about = {"quantity": verdict.quantity, "message": verdict.message, **figures_of(report)}
        self.event("amended", **amendment._asdict(), **more, **about)
        left_out = (
            f"step {amendment.first}"
            if amendment.first == amendment.last
            else f"steps {amendment.first} to {amendment.last}"
        )
        back = f"back to step {more['to']}, " if more else ""
        self.progress.say(f"{verdict.reason} at step {report.step}: {verdict.message}; {back}{left_out} left out")

    def _check_saves(self) -> None:
        stalled = self._writer.check()
        if stalled not in (None, self._said_stalled):
            self._said_stalled = stalled
            self.progress.say(f"the save of step {stalled} takes too long: does the disk hang? Training goes on")
            self.event("stalled_save", step=stalled)

    def evaluated(self, step: int, metrics: dict) -> None:
        """Records the held-out figures of a step."""
        self._past.evaluated[step] = metrics
        self.event("evaluated", step=step, **metrics)
        self.progress.say(f"held-out loss at step {step}: {metrics['loss']:.4f}")

    def is_evaluated(self, step: int) -> bool:
        return step in self._past.evaluated

    @property
    def evaluations(self) -> dict[int, dict]:
        """The held-out figures so far, by step; on every rank the same."""
        return self._past.evaluated

    def window(self, quantity: str, before: int) -> list[float]:
        """A recorded quantity in the steps before a step, as many as `guard` looks back on."""
        return self._past.window(quantity, before)

    def is_save_due(self) -> bool:
        """Whether a cadence of minutes has come round, on the clock of the rank that writes."""
        minutes = [every.minutes for every in self.plan.recipe.checkpoint.every if every.minutes]
        return self.is_writer and any(time.monotonic() - self.committed_at >= 60 * limit for limit in minutes)

    def commit(self, state: TrainState) -> None:
        """Begins to make the state a checkpoint and returns; the rest happens beside training, one save after the other.

        Waits only where two saves are under way. A save that failed is raised here, by `step` or by `finish`.
        """
        # before the wait: ranks that write nothing have room at once, and their reports time out
        report = self.reports.begin(state.step, self.plan.plan_id) if self.reports else None
        waited = self._writer.make_room()
        collectives.wait_for_everyone(
            state.accelerator
        )  # not in the next step, whose collectives give up on a slow disk
        self.committed_at = time.monotonic()
        self.last_step = step = state.step
        if not self.is_writer:
            self._writer.submit(step, 0, partial(_wait, report))
            return
        columns, self._columns = self._columns, Columns()
        history, evaluated = self._past.trainer_state(step), dict(self._past.evaluated)
        amendments = [each._asdict() for each in self.amendments if each.first <= step]
        record = Record(
            evaluated.get(step, {}), columns, history, evaluated, self._past.newest_step, waited, amendments
        )
        save = self._saver.begin(state, record)
        work = partial(self._saver.commit, save, self._journal, self._lease, report)
        self._writer.submit(step, save.snapshot.copy.bytes, work)

    def finish(self, state: TrainState) -> None:
        """Returns when everything that was begun is durable; raises why, where the last save was given up."""
        state.await_snapshot()
        self._writer.finish()
        if self.is_writer and (why := self._saver.given_up):
            hint = why.hint or "run the same command again; it resumes from the commit before"
            raise CheckpointError(f"the last step is not committed: {why.message}", where=str(self.path), hint=hint)

    def close(self) -> None:
        self._writer.close()
        if self.reports:
            self.reports.close()
        if self._journal:
            self._journal.close()

    def _world(self) -> dict:
        return {name: self._facts[name] for name in WORLD}


def _wait(report: Report) -> None:
    with suppress(MissingReport):  # rank 0 says so, and gives the save up
        report.wait()


def figures_of(report: StepReport) -> dict[str, float]:
    """What the journal has of a step, and must be the same when it is run again."""
    names = ("loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")
    return {name: getattr(report, name) for name in names}


def columns_of(report: StepReport) -> Columns:
    places = zip(report.examples.tolist(), report.rows.tolist(), report.row_losses, report.row_tokens, strict=True)
    rows = [RowLoss(report.step, *place) for place in places]
    return Columns(rows, [ModuleNorms(report.step, report.module_norms)])
