"""Finds the first bad step: recorded figures are looked up, states are evaluated by halves."""

import errno
import os
import secrets
import shutil
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from finetune.debug import predicates
from finetune.debug.predicates import Comparison, PredicateError
from finetune.debug.reexecute import Rerun
from finetune.errors import RunError, counted
from finetune.plan.disk import checkpoint_bytes, free_bytes
from finetune.store import cache
from finetune.store.checkpoints.manifest import Checkpoint, of_attempt
from finetune.store.checkpoints.store import Store
from finetune.store.durable import failures
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import Record
from finetune.training import collectives
from finetune.training.evaluation import evaluate
from finetune.training.saving import snapshot
from finetune.training.saving.buffers import Staging


@dataclass
class Found:
    first_bad: int
    """The first bad step."""
    last_good: int
    evaluations: int = 0
    """States evaluated for this search, without figures from the journal."""
    notes: list[str] = field(default_factory=list)
    """Caveats of the answer."""


class NoAnswer(Exception):
    """No step is bad, or none is good; this is an answer as well."""

    def __init__(self, message: str, states: "States | None" = None):
        self.evaluations = states.evaluations if states else 0
        super().__init__(message)


def search_record(rerun: Rerun, comparison: Comparison, good: int | None, bad: int | None) -> Found:
    """The first bad step after a good one. Nothing is evaluated: the journal has every step."""
    # both are only read, and the steps one at a time
    recorded = ChainMap(cast(dict[int, Record], rerun.steps), cast(dict[int, Record], rerun.refused))
    values = predicates.recorded(rerun.run, recorded, comparison)
    steps = [step for step in sorted(values) if (good is None or step > good) and (bad is None or step <= bad)]
    is_bad = {step: comparison.holds(values[step]) for step in steps}
    if not any(is_bad.values()):
        raise NoAnswer(f"never bad: no recorded step has {comparison}")
    first_good = good if good is not None else next((step for step in steps if not is_bad[step]), None)
    if first_good is None:
        raise NoAnswer(f"never good: every recorded step has {comparison}")
    found = next((step for step in steps if step > first_good and is_bad[step]), None)
    if found is None:
        raise NoAnswer(
            f"bad until step {first_good - 1} and good from step {first_good} on: it never went from good to bad"
        )
    notes = []
    if before := [step for step in steps if step < first_good and is_bad[step]]:
        notes.append(f"bad as well until step {before[-1]}, before it was good for the first time")
    after = [step for step in steps if step > found]
    if recovered := [step for step in after if not is_bad[step]]:
        notes.append(
            f"not for good: {len(recovered)} of the {counted(len(after), 'step')} after it are good again, from step {recovered[0]} on"
        )
    notes += [
        f"nothing is recorded of step {step}" for step in range(first_good, found) if step not in values and step
    ][:3]
    return Found(found, found - 1, notes=notes)


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
                shutil.copy(
                    RunDirectory(rerun.run).plan_file, self._scratch
                )  # a command may look for it, as beside any checkpoint
            state = rerun.state
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


@contextmanager
def _states(rerun: Rerun, predicate: Comparison | str) -> Iterator[States]:
    states = States(rerun, predicate)
    try:
        yield states
    finally:
        states.close()


def search_states(rerun: Rerun, predicate: Comparison | str, good: int | None, bad: int | None) -> Found:
    """By halves. The ends are evaluated unless they are given. Assumes that a bad state stays bad."""
    with _states(rerun, predicate) as states:
        stored, damaged = rerun.sound_checkpoints()
        first = rerun.plan.parent.step if rerun.plan.parent else 0
        last = bad if bad is not None else max(stored, default=None)
        if last is None:
            raise NoAnswer("the run has no checkpoint yet")
        newest = max(rerun.steps, default=0)
        for name, step in (("good", good), ("bad", bad)):
            if step is not None and not first <= step <= newest:
                raise PredicateError(
                    f"the {name} step {step} is not one of the run, which has steps {first} to {newest}"
                )
        if good is not None and good >= last:
            raise NoAnswer(f"no state after step {good} is stored: train on, or give --bad STEP")
        low = start = good if good is not None else first
        verdict = states.is_bad(last, stored[last]) if bad is None else True
        if verdict is None:
            raise NoAnswer(f"the command cannot tell of step {last}, the last one that is stored", states)
        if not verdict:
            raise NoAnswer(f"never bad: the state at step {last}, the last one that is stored, is good", states)
        low, high, unknown = _halves(sorted(step for step in stored if low < step < last), low, last, stored, states)
        # the start is evaluated last: usually some later state is good, and it is not needed
        verdict = states.is_bad(low, stored.get(low)) if good is None and low == start else False
        if verdict is None:
            raise NoAnswer(f"the command cannot tell of step {low}, where the run begins", states)
        if verdict:
            raise NoAnswer(f"never good: the state at step {low}, where the run begins, is bad already", states)
        low, high, more = _between(rerun, states, low, high, stored)
        notes = [f"{name} is damaged, and was skipped" for name in damaged]
        notes += [f"the command could not tell of steps {sorted(unknown | more)}"] if unknown | more else []
        if any(low < step < high for step in unknown | more):
            notes.append(f"so the first bad step is one of {low + 1} to {high}")
        return Found(high, low, states.evaluations, notes)


def _halves(
    steps: list[int], low: int, high: int, stored: dict[int, Checkpoint], states: States
) -> tuple[int, int, set[int]]:
    """The last good and the first bad one of the stored states, and those the command could not judge."""
    unknown: set[int] = set()
    while left := [step for step in steps if low < step < high and step not in unknown]:
        step = left[len(left) // 2]
        verdict = states.is_bad(step, stored[step])
        if verdict is None:
            unknown.add(step)
        elif verdict:
            high = step
        else:
            low = step
    return low, high, unknown


def _between(
    rerun: Rerun, states: States, low: int, high: int, stored: dict[int, Checkpoint]
) -> tuple[int, int, set[int]]:
    """The same inside the bracket, by running its steps again. The search continues from a good state, and steps back from a bad one."""
    is_to_write = high - low > 1
    rerun.go_to(low, rerun.say)
    good_one = stored.get(low) or (states.write(None) if low and is_to_write else None)
    unknown: set[int] = set()
    while left := [step for step in range(low + 1, high) if step not in unknown]:
        step = left[len(left) // 2]
        if rerun.state.step > step:
            rerun.begin_at(good_one)
        rerun.go_to_from_here(step)
        written = states.write(good_one) if states.is_command else None
        verdict = states.is_bad(step, written)
        if verdict is False:
            low, before, good_one = step, good_one, written or states.write(good_one)
            states.remove(before)
            continue
        states.remove(written)
        if verdict is None:
            unknown.add(step)
        else:
            high = step
    return low, high, unknown
