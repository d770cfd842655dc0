"""A process for each tracker beside the training, which never waits for one before its end.

A process that fails is started again a while later: the figures are in the journal.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from finetune.errors import counted
from finetune.store.run import scan
from finetune.training.trackers import sent
from finetune.training.trackers.follow import CALL_SECONDS

FINISH_SECONDS = 30.0
"""How long the end of a training waits for all trackers together."""
SILENT_SECONDS = 1.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60.0, 3600.0


class Process:
    """The process of one tracker, and after it failed the next one."""

    def __init__(self, run: Path, name: str, say: Callable[[str], None]):
        self.name = name
        self._run = run
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

    def close(self, seconds: float | None) -> str | None:
        """Waits so long, and ends it; returns why not all has arrived."""
        if self._process is None:
            return "no process could be started"
        reason = None
        if not self.has_ended_within(seconds):
            reason = f"it did not end within {counted(round(FINISH_SECONDS), 'second')}"
        elif self._process.returncode:
            reason = self._reason(self._process)
        self._hear(self._process)
        self._kill(is_in_order=reason is None)
        return reason

    def missing(self) -> str:
        """The steps that the tracker does not have."""
        known = sent.read(self._run, self.name)
        newest, last = max(scan.read(self._run).steps, default=0), known.step if known else 0
        return f"steps {last + 1} to {newest}" if last < newest else "the last figures"

    def _start(self) -> None:
        command = [sys.executable, "-m", "finetune.training.trackers", str(self._run), self.name]
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
        self._tell(f"tracker {self.name} stopped: {reason}; training goes on, and the journal has its figures")

    def _hear(self, process: subprocess.Popen[bytes]) -> None:
        """Its first line is the place of the run."""
        with suppress(BlockingIOError):
            while process.stdout and (part := os.read(process.stdout.fileno(), 4096)):
                self._heard += part
        if b"\n" in self._heard:
            place = self._heard.split(b"\n")[0].decode(errors="replace")
            self._tell(f"tracker {self.name}: {place}")

    def _reason(self, process: subprocess.Popen[bytes]) -> str:
        self._hear(process)
        code = process.returncode
        if code == -signal.SIGALRM:
            return f"it did not answer for {counted(CALL_SECONDS, 'second')}"
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


class Tracked:
    """The trackers of a run."""

    def __init__(self, run: Path, names: Sequence[str], say: Callable[[str], None]):
        self._run = run
        self._say = say
        self._processes = [Process(run, name, say) for name in names]

    def look(self) -> None:
        for process in self._processes:
            process.look()

    def finish(self, seconds: float | None = FINISH_SECONDS) -> dict[str, str]:
        """Waits so long at most for what is not sent yet. Returns and says why not all has arrived, by tracker."""
        for process in self._processes:
            process.end()
        until = None if seconds is None else time.monotonic() + seconds
        late = [process.name for process in self._processes if not process.has_ended_within(SILENT_SECONDS)]
        if late and seconds:
            self._say(f"waiting up to {counted(round(seconds), 'second')} for the last figures: {', '.join(late)}")
        left: dict[str, str] = {}
        for process in self._processes:
            if reason := process.close(max(0.0, until - time.monotonic()) if until else None):
                hint = f"they are in the journal, and `finetune track {self._run}` sends them"
                self._say(f"tracker {process.name}: {process.missing()} did not arrive ({reason}); {hint}")
                left[process.name] = reason
        return left
