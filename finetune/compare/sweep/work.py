"""Works a sweep off: claims trials that are due, trains them, and records what became of them, until none is left.

Every process that does this is alike, on this machine or another: there is no server, and the one that you started first is no master.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from finetune.compare.sweep import queue, trainings
from finetune.compare.sweep.directory import Reason, Sweep, Trial
from finetune.compare.sweep.queue import Task
from finetune.compare.sweep.space import told
from finetune.compare.sweep.trainings import Training
from finetune.errors import AdapterError, FinetuneError, NotFiniteError, RecipeError, Stopped, counted, duration
from finetune.hosts.signals import ending_signals
from finetune.plan.facts import Metrics
from finetune.store import lock
from finetune.store.run import journal, scan
from finetune.store.run.directory import RunDirectory

OWN = (NotFiniteError.code, "spike", AdapterError.code, RecipeError.code)
"""The errors that a trial's settings make. Others are about the machine: then the worker ends, and no trial is to blame."""
BETWEEN_LOOKS_SECONDS, BETWEEN_CLAIMS_SECONDS = 0.1, 1.0
MOST_KILLS = 3  # of one trial by others, one after the other and without a commit in between
OF_MEMORY = ("OutOfMemoryError", "MemoryError", "out of memory", "Cannot allocate memory")


def work(sweep: Sweep, workers: int, say: Callable[[str], None]) -> None:
    """Returns when no trial is due any more, here or elsewhere. Raises Stopped after a signal, with every training committed."""
    crew = Crew(sweep, workers, say)
    with _heard() as signals:
        try:
            looked_at = -BETWEEN_CLAIMS_SECONDS
            while not signals:
                if crew.settle() or time.monotonic() - looked_at >= BETWEEN_CLAIMS_SECONDS:
                    if not crew.fill():
                        break
                    looked_at = time.monotonic()
                time.sleep(BETWEEN_LOOKS_SECONDS)
        finally:
            crew.stop(signals)
    if signals:
        raise Stopped(signals[0])
    if sweep.spec.method == "tpe":
        from finetune.compare.sweep import tpe  # Optuna is an extra, and takes its time to import

        tpe.conclude(sweep)


class Crew:
    """The trainings of this process, at most `workers` at a time."""

    def __init__(self, sweep: Sweep, workers: int, say: Callable[[str], None]):
        self.sweep = sweep
        self.running: list[Training] = []
        self._say = say
        self._slots = [*range(workers)]
        """Those that are free."""
        self._kills: dict[int, int] = {}
        self._began = time.monotonic()
        self._tokens = _trained(sweep)
        """Those of all trials at the start."""
        self._is_stopping = False
        self._is_waiting = False

    def fill(self) -> bool:
        """Starts what is due where a slot is free. False if nothing is left to train, here or elsewhere."""
        trials = self.sweep.trials()
        due = queue.standing(self.sweep.spec, trials).due
        for task in due:
            if self._slots and task.number not in {each.trial.number for each in self.running}:
                self._begin(task, trials[task.number])
        may_ask = self.sweep.spec.method == "tpe" and len(trials) < self.sweep.spec.trials
        while may_ask and self._slots and (trial := self._asked()):
            self._begin(Task(trial.number, None), trial)
        if due and not self.running and not self._is_waiting:
            self._say("waiting for trials that other workers have")
        self._is_waiting = not self.running
        return bool(due or self.running or may_ask)

    def _asked(self) -> Trial | None:
        """Another trial of TPE; None if all are there, or another worker is just asking."""
        from finetune.compare.sweep import tpe

        return tpe.ask(self.sweep, take_over=not self.running)

    def _begin(self, task: Task, trial: Trial) -> None:
        # A heartbeat is watched for half a minute, where there are no locks: not while trainings here may end.
        claim = self.sweep.claim(task.number, take_over=not self.running)
        if claim is None:
            return
        # Read under the claim: another worker may have trained it since.
        trial = self.sweep.trial(task.number) or trial
        is_done = trial.reason or trial.is_finished or task.until in trial.results
        # The training of a killed worker: it commits, and ends soon.
        if is_done or lock.is_held(RunDirectory(self.sweep.run(task.number)).lock):
            claim.release()
            return
        training = trainings.start(self.sweep, trial, task, claim, self._slots.pop(0))
        self.running.append(training)
        self._say(f"{self._name(trial)}: {'goes on' if training.step else 'begins'} at step {training.step}")

    def settle(self) -> bool:
        """Records what became of the trainings that have ended. Whether there was one."""
        ended = [training for training in self.running if training.process.poll() is not None]
        for training in ended:
            self.running.remove(training)
            self._slots = sorted([*self._slots, training.slot])
            try:
                self._record(training, training.process.returncode)
            finally:
                training.claim.release()
        return bool(ended)

    def stop(self, signals: list[int]) -> None:
        """Asks the trainings to commit and to end, once for each signal; kills what has not ended when its grace is over."""
        self._is_stopping = True
        signals = signals or [signal.SIGTERM]  # an error ends the work
        deadline = time.monotonic() + self.sweep.loaded.recipe.checkpoint.grace_seconds
        sent = 0
        while self.running:
            numbers = [signal.SIGKILL] if time.monotonic() > deadline else signals[sent:]
            for training in self.running if numbers else ():
                training.process.send_signal(numbers[-1])
            sent = len(signals)
            self.settle()
            time.sleep(BETWEEN_LOOKS_SECONDS / 2)

    def _record(self, training: Training, code: int) -> None:
        training.claim.check()  # without locks, another worker may have taken it
        trial, error = training.trial, training.code()
        if code == 0:
            self._record_result(trial, training.task)
        elif self._is_stopping and (code < 0 or code - 128 in ending_signals()):
            self._say(f"{self._name(trial)}: stopped at step {trainings.committed(self.sweep.run(trial.number))}")
        elif reason := self._reason(training, code, error):
            self.sweep.write(replace(trial, reason=reason))
            self._say(f"{self._name(trial)}: failed: {reason.message}")
        elif error:
            raise FinetuneError(
                f"trial {trial.number} cannot be trained here: {training.last_words()}",
                where=str(training.log),
                hint="fix it and run the same command again: the sweep goes on where it was",
            )

    def _record_result(self, trial: Trial, task: Task) -> None:
        run = self.sweep.run(trial.number)
        plan, _ = RunDirectory(run).plan()
        step = min(task.until or plan.steps, plan.steps)
        metrics, tokens = result_of(run, step)
        self._kills.pop(trial.number, None)
        self.sweep.write(trial.with_result(step, metrics, tokens, is_finished=step == plan.steps))
        done = "finished" if step == plan.steps else "paused"
        loss = f"held-out loss {float(metrics['loss']):.4f}"
        self._say(f"{self._name(trial)}: {done} at step {step}, {loss}; about {duration(self._seconds_left())} left")

    def _seconds_left(self) -> float:
        """By the pace of all workers since this one began."""
        trained = _trained(self.sweep)
        per_token = (time.monotonic() - self._began) / max(1, trained - self._tokens)
        return max(0, self.sweep.spec.tokens - trained) * per_token

    def _reason(self, training: Training, code: int, error: str) -> Reason | None:
        """Why a trial failed; None if it did not: it goes on, or something is wrong with this machine."""
        words = training.last_words()
        if error:
            return Reason(error, words) if error in OWN else None
        if code > 0 and code - 128 not in ending_signals():  # a traceback
            is_memory = any(sign in words for sign in OF_MEMORY)
            return Reason("out_of_memory" if is_memory else "crashed", words or f"exit code {code}")
        number, step = training.trial.number, trainings.committed(self.sweep.run(training.trial.number))
        self._kills[number] = 1 if step > training.step else self._kills.get(number, 0) + 1
        by = signal.Signals(-code if code < 0 else code - 128).name
        if self._kills[number] < MOST_KILLS:
            self._say(f"{self._name(training.trial)}: killed by {by}; it goes on at step {step}")
            return None
        message = f"killed by {by} {counted(MOST_KILLS, 'time')} at step {step}; is there too little memory?"
        return Reason("killed", message)

    def _name(self, trial: Trial) -> str:
        return f"trial {trial.number:03} ({told(trial.settings, self.sweep.spec.tried)})"


def result_of(run: Path, step: int) -> tuple[Metrics, int]:
    """Held-out figures of a step of a run, and the tokens that it has trained on by then."""
    events, steps = scan.read(run)
    metrics = journal.evaluations(events).get(step)
    if metrics is None:
        raise FinetuneError(f"has no held-out figures of step {step}", where=str(run))
    return metrics, sum(steps[each]["tokens"] for each in steps if each <= step)


def _trained(sweep: Sweep) -> int:
    """The tokens of all trials so far."""
    return sum(trial.tokens for trial in sweep.trials().values())


@contextmanager
def _heard() -> Iterator[list[int]]:
    """The signals that ask for the end, as they come in. A handler that does more could find a lock held by what it interrupts."""
    signals: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    previous = {number: signal.signal(number, hear) for number in ending_signals()}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def retry(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Lets failed trials go on."""
    for trial in sweep.trials().values():
        if trial.reason and (claim := sweep.claim(trial.number)):
            with claim:
                sweep.write(replace(trial, reason=None))
            say(f"trial {trial.number:03} is tried again")
