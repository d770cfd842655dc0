"""Processes beside a training, for each tracker and for the mirror; `store.companion` is what they run. The training never waits for one
before its end. One that fails is started again a while later: what it sends is on the disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from finetune.errors import counted

SILENT_SECONDS = 1.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60.0, 3600.0


class Work(NamedTuple):
    """What a process does beside a training."""

    name: str
    """What a person calls it, like `tracker csv`."""
    arguments: tuple[str, ...]
    """Of Python."""
    kept: str
    """What is not lost if it fails."""
    call_seconds: int
    """Without an answer for so long, it ends itself."""
    is_heard: bool = False
    """Whether all that it says is for the person, and not only its first line."""


class Process:
    """A process beside the training, and after it failed the next one."""

    def __init__(self, work: Work, say: Callable[[str], None]):
        self.work = work
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._said: list[str] = []
        self._heard = b""
        self._retry_seconds, self._retry_at = RETRY_SECONDS, 0.0
        self._start()

    def look(self) -> None:
        """Says what there is to say, and starts a failed one again when it is time. Takes microseconds."""
        if self._process:
            self._hear(self._process)
            if self._process.poll() is not None:
                self._fail(self._reason(self._process))
        elif time.monotonic() >= self._retry_at:
            self._start()

    def end(self) -> None:
        """The training has ended: what is left is to be sent, by a new process if there is none."""
        self.look()
        if self._process is None:
            self._start()
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def has_ended_within(self, seconds: float | None) -> bool:
        try:
            if self._process:
                self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def hear(self) -> None:
        """Says what there is to say."""
        if self._process:
            self._hear(self._process)

    def close(self, seconds: float | None, limit: float | None = None) -> str | None:
        """Waits so long, and ends it; returns why not all has arrived. `limit` is what the wait was before others had a part of it."""
        if self._process is None:
            return "no process could be started"
        reason = None
        if not self.has_ended_within(seconds):
            reason = f"it did not end within {counted(round(limit or seconds or 0), 'second')}"
        elif self._process.returncode:
            reason = self._reason(self._process)
        self.hear()
        self._kill(is_in_order=reason is None)
        return reason

    def _start(self) -> None:
        command = [sys.executable, *self.work.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        try:
            # A session for itself: signals to the training are not for it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._fail(f"{error.strerror}")
            return
        if self._process.stdout:
            os.set_blocking(self._process.stdout.fileno(), False)

    def _fail(self, reason: str) -> None:
        self._kill()
        self._process, self._heard = None, b""
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, LONGEST_RETRY_SECONDS)
        self._tell(f"{self.work.name} stopped: {reason}; training goes on, and {self.work.kept}")

    def _hear(self, process: subprocess.Popen[bytes]) -> None:
        """Its first line is where the run is, for a person."""
        with suppress(BlockingIOError):
            while process.stdout and (part := os.read(process.stdout.fileno(), 4096)):
                self._heard += part
        *whole, torn = self._heard.split(b"\n")
        for line in whole if self.work.is_heard else whole[:1]:
            self._tell(f"{self.work.name}: {line.decode(errors='replace')}")
        if self.work.is_heard and whole:
            # Only the last line is needed once more, for the reason of a failure.
            self._heard = whole[-1] + b"\n" + torn

    def _reason(self, process: subprocess.Popen[bytes]) -> str:
        self._hear(process)
        code = process.returncode
        if code == -signal.SIGALRM:
            return f"it did not answer for {counted(self.work.call_seconds, 'second')}"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        lines = self._heard.decode(errors="replace").splitlines()
        return lines[-1] if lines else f"its process ended with exit code {code}"

    def _kill(self, is_in_order: bool = False) -> None:
        """With what the client started, unless it has ended in order."""
        if self._process is None:
            return
        if not is_in_order:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        # Closes its pipes as well.
        with self._process:
            self._process.wait()

    def _tell(self, line: str) -> None:
        """Once: a tracker that fails each minute says so only the first time."""
        if line not in self._said:
            self._said.append(line)
            self._say(line)
