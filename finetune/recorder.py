"""Floor 4. A run directory that is being written: plan, journal, row losses, checkpoints. `run` tells it what happened.

Only rank 0 has one that writes; the others' does nothing, so that what a rank does never depends on which one it is.
"""

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from finetune import journal as journals
from finetune.checkpoints import snapshot as snapshots
from finetune.checkpoints.durable import replace_file
from finetune.checkpoints.manifest import Checkpoint, Damage, Manifest, is_as_recorded
from finetune.checkpoints.retention import Saved, keep
from finetune.checkpoints.snapshot import Snapshot
from finetune.checkpoints.staging import Staging
from finetune.checkpoints.store import Store
from finetune.errors import FinetuneError, RunError
from finetune.loop import StepReport
from finetune.plan import Plan
from finetune.progress import Progress
from finetune.state import TrainState

# Facts that are recorded, not promised: where they differ on resume, bit equality may be lost.
WORLD = ("device", "world_size", "threads", "micro_batch_tokens")


class Recorder:
    def __init__(self, path: Path, plan: Plan, facts: dict, attempt: str, progress: Progress, is_writer: bool):
        self.path = path
        self.plan = plan
        self.progress = progress
        self.is_writer = is_writer
        self.committed_at = time.monotonic()
        self._facts = facts
        self._attempt = attempt
        self._store = Store(path)
        self._last: Checkpoint | None = None
        self.last_step = 0  # of the newest commit, also while it is being written
        self._has_failed = False
        self._staging = Staging()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._saves: list[Future] = []
        self._losses: list[journals.RowLoss] = []
        records = journals.read(path)
        self._steps = journals.steps(records)
        self._evaluated = journals.evaluations(records)
        committed = [record["step"] for record in records if record.get("event") == "committed"]
        self.newest_recorded = max(committed, default=0)
        """The newest step that the journal says was committed."""

    def open(
        self, recipe_text: str, base_directory: Path, changes: list[str]
    ) -> tuple[Checkpoint | None, list[Damage]]:
        """Writes down what is about to happen; returns the newest sound checkpoint, and what is wrong with newer ones."""
        self._refuse_strangers()
        if self.is_writer:
            self._restore_companions(base_directory)
        self._last, damages = self._store.newest_sound()
        self.last_step = self._last.step if self._last else 0
        self._damaged = {damage.file.partition("/")[0] for damage in damages}
        if self.is_writer:
            self._store.sweep()
            replace_file(self.path / "recipe.yaml", recipe_text.encode())
            replace_file(self.path / "plan.json", self.plan.dump(self._facts))
            self._journal = journals.Journal(self.path)
            self.event("started", step=self.last_step, plan_id=self.plan.plan_id, changes=changes, world=self._world())
            for damage in damages:
                self.event(
                    "damaged", check=damage.check, file=damage.file, tensor=damage.tensor, message=damage.message
                )
        return self._last, damages

    def _refuse_strangers(self) -> None:
        """A checkpoint of another run or plan would be taken for a step of this one."""
        for checkpoint in self._store.checkpoints():
            manifest = checkpoint.manifest
            if manifest.run != self._facts["run"] or manifest.plan_id != self.plan.plan_id:
                raise RunError(
                    "belongs to another run or plan",
                    where=str(checkpoint.path),
                    hint="move it away, or use another --run",
                )

    def _restore_companions(self, base_directory: Path) -> None:
        """Small files that the base still has are put right where they are damaged: weights beside them need not be given up."""
        for checkpoint in self._store.checkpoints():
            for file in snapshots.companions(base_directory):
                record, kept = checkpoint.manifest.files.get(file.name), checkpoint.path / file.name
                if record and not is_as_recorded(kept, record) and is_as_recorded(file, record):
                    replace_file(kept, file.read_bytes())
                    self.progress.say(f"restored {kept.relative_to(self.path)} from the base")

    def event(self, name: str, **figures: object) -> None:
        if self.is_writer:
            self._journal.append({"kind": "event", "event": name, "attempt": self._attempt, "time": _now(), **figures})

    def step(self, report: StepReport) -> None:
        """Appends a step to the journal. A step that ran before must give the same figures, or the run says so at once."""
        record = {
            "kind": "step",
            "step": report.step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "tokens": report.tokens,
            "supervised_tokens": report.supervised_tokens,
            "seconds": round(report.seconds, 6),
            "await_seconds": round(report.await_seconds, 6),
            "attempt": self._attempt,
            "time": _now(),
        }
        self._raise_failures()
        earlier = self._steps.get(report.step)
        self._steps[report.step] = record
        if self.is_writer:
            self._journal.append(record)
            self._losses += _row_losses(report)
            changed = journals.difference(earlier, record) if earlier else None
            if changed:
                was = f"{changed} was {earlier.get(changed)!r} and is {record.get(changed)!r}"
                self.progress.say(f"step {report.step} ran before and is not the same: {was}; exactness is lost")
                self.event("not_exact", step=report.step, quantity=changed)
        self.progress.step(
            report.step, report.loss, report.learning_rate, report.grad_norm, report.tokens, report.seconds
        )

    def evaluated(self, step: int, metrics: dict) -> None:
        """Records the held-out figures of a step."""
        self._evaluated[step] = metrics
        self.event("evaluated", step=step, **metrics)
        self.progress.say(f"held-out loss at step {step}: {metrics['loss']:.4f}")

    def is_evaluated(self, step: int) -> bool:
        return step in self._evaluated

    def history(self, quantity: str, before: int, count: int) -> list[float]:
        """A recorded quantity in the `count` steps before a step."""
        window = range(max(1, before - count), before)
        return [self._steps[step][quantity] for step in window if step in self._steps]

    def commit(self, state: TrainState, base_directory: Path, metrics: dict | None) -> None:
        """Begins to make the state a checkpoint and returns; the rest happens beside training, one save after the other.

        Waits only when two saves are under way. A save that failed is raised here or by `finish`.
        """
        self.committed_at = time.monotonic()
        self.last_step = state.step
        if self.is_writer:
            snapshot = snapshots.take(state, self.plan, self._staging)
            losses, self._losses = self._losses, []
            history = list(self._steps.values())
            self._saves.append(self._writer.submit(self._write, snapshot, base_directory, metrics, losses, history))

    def finish(self, state: TrainState) -> None:
        """Returns when everything that was begun is durable."""
        state.await_snapshot()
        for save in self._saves:
            save.exception()
        self._raise_failures()

    def close(self) -> None:
        self._writer.shutdown()
        if self.is_writer:
            self._journal.close()

    def _raise_failures(self) -> None:
        for save in [save for save in self._saves if save.done()]:
            self._saves.remove(save)
            save.result()

    def _write(
        self, snapshot: Snapshot, base_directory: Path, metrics: dict | None, losses: list, history: list
    ) -> None:
        """One save, on the writer's thread: row losses and journal first, so that no checkpoint is ahead of its record."""
        started = time.monotonic()
        step = snapshot.step
        try:
            if self._has_failed:  # a checkpoint after a gap would lack the row losses of the one before
                return
            if losses:
                journals.write_rows(self.path, losses)
            self._journal.sync()
            attempt = self._store.begin(step, self._attempt)
            snapshots.write(snapshot, self.plan, base_directory, self._last, attempt)
            attempt.write_json("trainer_state.json", self._trainer_state(step, history))
            self._last = self._store.commit(attempt, self._manifest(step, metrics), verify_digests=True)
        except FinetuneError:
            self._has_failed = True
            raise
        finally:
            snapshot.copy.release()
        self._damaged.discard(self._last.path.name)
        self.event("committed", step=step, save_seconds=round(time.monotonic() - started, 3))
        self.progress.say(f"committed step {step}")
        self._remove_old()

    def _manifest(self, step: int, metrics: dict | None) -> Manifest:
        last = self._last
        return Manifest(
            run=self._facts["run"],
            attempt=self._attempt,
            step=step,
            parent={"ref": f"{self.path.absolute().name}@{last.step}", "digest": last.manifest.digest}
            if last
            else None,
            plan_id=self.plan.plan_id,
            metrics=metrics or {},
            versions=self._facts["versions"],
            world=self._world(),
        )

    def _world(self) -> dict:
        return {name: self._facts[name] for name in WORLD}

    def _trainer_state(self, step: int, records: list[dict]) -> dict:
        """Loss history in the form that tools read from other trainers' runs."""
        names = ("step", "loss", "grad_norm", "learning_rate")
        by_step = sorted((record for record in records if record["step"] <= step), key=lambda record: record["step"])
        history = [{name: record[name] for name in names} for record in by_step]
        return {"global_step": step, "max_steps": self.plan.steps, "log_history": history}

    def _remove_old(self) -> None:
        """Retention, after the successor was committed and every byte of it read back. A damaged checkpoint counts for nothing."""
        checkpoints = self._store.checkpoints()
        sound = [checkpoint for checkpoint in checkpoints if checkpoint.path.name not in self._damaged]
        saved = [Saved(item.step, item.manifest.metrics or self._evaluated.get(item.step, {})) for item in sound]
        kept = keep(saved, self.plan.recipe.checkpoint.keep, protected=set())
        for checkpoint in sound:  # what is damaged stays: it makes room when its step is committed again
            if checkpoint.step not in kept:
                self._store.remove(checkpoint)
                self.event("removed", step=checkpoint.step)


def _row_losses(report: StepReport) -> Iterable[journals.RowLoss]:
    columns = zip(report.examples.tolist(), report.rows.tolist(), report.row_losses, report.row_tokens, strict=True)
    return [journals.RowLoss(report.step, *column) for column in columns]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
