"""The thread that saves are done on, one after the other, and how training learns of its health. `recorder` uses it.

A thread, not a process: hashing and writing leave the interpreter to the others, and beside a training both cost it the same
(`scripts/bench/checkpoints.py` shows them side by side).
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from finetune.errors import CheckpointError
from finetune.store.durable import SLOWEST_DISK, STALL_SECONDS

WRITER = "writer"  # the thread's name
IN_FLIGHT = 2  # a third one waits: each holds a copy of the state


class Job:
    """A save that was handed over; done when `ended` is set."""

    def __init__(self, step: int, size: int, work: Callable[[], None]):
        self.step = step
        self.limit_seconds = STALL_SECONDS + size / SLOWEST_DISK
        self.work = work
        self.began: float | None = None
        self.ended = threading.Event()

    @property
    def is_stalled(self) -> bool:
        return self.began is not None and not self.ended.is_set() and time.monotonic() - self.began > self.limit_seconds


class Writer:
    """At most two saves under way. What goes wrong in one is raised by `check`, `submit` or `finish`, in the caller's thread."""

    def __init__(self, in_flight: int = IN_FLIGHT) -> None:
        self.in_flight = in_flight
        self._jobs: deque[Job] = deque()
        self._is_there_work = threading.Condition()
        self._error: BaseException | None = None
        self._is_closing = False
        # a daemon: a disk that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name=WRITER, daemon=True)
        self._thread.start()

    def submit(self, step: int, size: int, work: Callable[[], None]) -> None:
        """Hands over a save of `size` bytes. Call `make_room` first."""
        with self._is_there_work:
            self._jobs.append(Job(step, size, work))
            self._is_there_work.notify()

    def make_room(self) -> float:
        """Returns when one more save may be under way; the seconds waited. CheckpointError when the disk takes no more."""
        return self._wait_until(self.in_flight - 1)

    def finish(self) -> None:
        """Returns when nothing is under way any more."""
        self._wait_until(0)

    def check(self) -> int | None:
        """Raises what went wrong in a save; the step of one that takes too long, if there is one."""
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise CheckpointError("the writer of checkpoints died", hint="run the same command again; it resumes")
        jobs = list(self._jobs)
        return next((job.step for job in jobs if job.is_stalled), None)

    def close(self) -> None:
        """Lets the thread end after what was handed over; waits for it unless the disk hangs."""
        with self._is_there_work:
            self._is_closing = True
            self._is_there_work.notify()
        while self._thread.is_alive() and not any(job.is_stalled for job in list(self._jobs)):
            self._thread.join(0.05)

    def _wait_until(self, count: int) -> float:
        started = time.monotonic()
        # A copy, because the thread removes jobs meanwhile.
        while len(jobs := list(self._jobs)) > count:
            if (stalled := self.check()) is not None:
                raise CheckpointError(
                    f"the save of step {stalled} has not ended for {jobs[0].limit_seconds:.0f} s",
                    hint="the disk hangs or is too slow: look at it, then run the same command again; it resumes",
                )
            # Short waits, so that a stall or an error shows while it happens.
            jobs[0].ended.wait(0.05)
        self.check()
        return time.monotonic() - started

    def _run(self) -> None:
        while True:
            with self._is_there_work:
                self._is_there_work.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    return
                job = self._jobs[0]
            job.began = time.monotonic()
            try:
                if self._error is None:  # a checkpoint after a gap would lack what the one before had to write
                    job.work()
            except BaseException as error:  # noqa: BLE001 it is raised again in the thread that asks
                self._error = error
            finally:
                # Removed first: the waiter that `ended` wakes counts the jobs that are left.
                self._jobs.popleft()
                job.ended.set()
