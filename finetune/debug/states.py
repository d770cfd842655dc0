"""Evaluates states of a run for a search, and writes those between checkpoints where a command can read them.

Its files lie apart from the run's checkpoints, and are removed with it.
"""

import errno
import os
import secrets
import shutil
from pathlib import Path

from finetune.debug import predicates
from finetune.debug.predicates import Comparison, PredicateError
from finetune.debug.reexecute import Rerun
from finetune.errors import RunError
from finetune.plan.disk import checkpoint_bytes, free_bytes
from finetune.store import cache
from finetune.store.checkpoints.manifest import Checkpoint, of_attempt
from finetune.store.checkpoints.store import Store
from finetune.store.durable import failures
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives
from finetune.training.evaluation import evaluate
from finetune.training.saving import snapshot
from finetune.training.saving.buffers import Staging


class States:
    """Evaluates states of a run, stored ones and those between; its files are removed with it."""

    def __init__(self, rerun: Rerun, predicate: Comparison | str):
        self.rerun = rerun
        self.evaluations = 0
        self.is_command = isinstance(predicate, str)
        self._predicate = predicate
        self._scratch: Path | None = None
        self._staging = Staging()

    def is_bad(self, step: int, checkpoint: Checkpoint | None) -> bool | None:
        """Whether the state after a step is bad; None if the command cannot tell. The rerun is at this step, unless it is stored."""
        rerun = self.rerun
        if isinstance(self._predicate, Comparison):
            quantity = self._predicate.quantity
            metrics = journal.evaluations(rerun.events).get(step, {})
            if quantity not in metrics:
                if not rerun.is_at(step):
                    rerun.begin_at(checkpoint)
                self.evaluations += 1
                metrics = evaluate(rerun.resolved, rerun.accelerator, rerun.state.objective) or {}
            value = metrics.get(quantity)
            if value is None:
                names = ", ".join(metrics)
                raise PredicateError(f"an evaluation has no `{quantity}`", hint=f"it has {names}")
            is_bad = self._predicate.holds(float(value))
            rerun.say(f"step {step}: {quantity} {float(value):.6g}, {'bad' if is_bad else 'good'}")
            return is_bad
        self.evaluations += 1
        path = checkpoint.path if checkpoint else rerun.resolved.base_directory
        code = {None: 2, True: 1, False: 0}
        answer = predicates.run_command(self._predicate, path) if rerun.accelerator.is_main_process else None
        told = collectives.of_rank_0(rerun.accelerator, code[answer])
        verdict = {2: None, 1: True, 0: False}[told]
        rerun.say(f"step {step}: {'the command cannot tell' if verdict is None else 'bad' if verdict else 'good'}")
        return verdict

    def write(self, previous: Checkpoint | None) -> Checkpoint:
        """The current state as a checkpoint, in a temporary directory on the run's disk, removed with this object."""
        rerun = self.rerun
        if self._scratch is None:
            self._scratch = self._new_scratch()
        store = Store(self._scratch)
        if rerun.accelerator.is_main_process:
            with failures(self._scratch, RunError):
                # Commands expect the plan beside a checkpoint.
                shutil.copy(RunDirectory(rerun.run).plan_file, self._scratch)
            state = rerun.whole_state
            taken = snapshot.take(state, snapshot.Live(state), rerun.plan, self._staging)
            attempt = store.begin(state.step, "bisect")
            snapshot.write(taken, rerun.plan, rerun.resolved.companions, previous, attempt)
            store.commit(attempt, of_attempt(rerun.facts, rerun.plan.plan_id, "bisect", state.step))
            taken.copy.release()
        collectives.wait_for_everyone(rerun.accelerator)
        return store.find(rerun.state.step)

    def _new_scratch(self) -> Path:
        """A directory on the run's disk; in the cache if the run is not writable or its disk has no room for two states."""
        rerun, token, is_elsewhere = self.rerun, secrets.randbits(40), 0
        places = [RunDirectory(rerun.run).debug, cache.root()]
        if rerun.accelerator.is_main_process:
            for left in places[0].glob("bisect-*"):  # of a killed search
                shutil.rmtree(left, ignore_errors=True)
            room = 2 * checkpoint_bytes(rerun.plan)
            try:
                if free_bytes(places[0]) < min(room, free_bytes(places[1])):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                (places[0] / f"bisect-{token:010x}").mkdir(parents=True)
            except OSError as error:
                is_elsewhere = 1
                rerun.say(
                    f"{places[0]} cannot be written ({error.strerror}): states are written to {places[1]} meanwhile"
                )
        token = collectives.of_rank_0(rerun.accelerator, token)
        scratch = places[collectives.of_rank_0(rerun.accelerator, is_elsewhere)] / f"bisect-{token:010x}"
        if rerun.accelerator.is_main_process:
            with failures(scratch, RunError):
                scratch.mkdir(parents=True, exist_ok=True)
        return scratch

    def remove(self, checkpoint: Checkpoint | None) -> None:
        """Removes the files of `write`, and nothing else."""
        if checkpoint is None or self._scratch is None or not checkpoint.path.is_relative_to(self._scratch):
            return
        if self.rerun.accelerator.is_main_process:
            Store(self._scratch).remove(checkpoint)

    def close(self) -> None:
        if self._scratch and self.rerun.accelerator.is_main_process:
            shutil.rmtree(self._scratch, ignore_errors=True)
