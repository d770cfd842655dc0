"""Real `finetune` processes in a temporary directory.

If an error or a signal ends the caller, no process may stay behind, and no directory unless it is to be kept.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from finetune.errors import FinetuneError, RunError
from finetune.hosts.signals import ending_signals
from finetune.store.durable import failures

SHOWN_LINES = 12
GONE_SECONDS = 30  # for the kernel to remove a killed process


class TrainingError(FinetuneError):
    """A training of a rehearsal ended by itself; the message has its last words."""

    code = "rehearsal"


class Trainings:
    """One process after the other; their output goes into the file `log`."""

    def __init__(self, directory: Path, is_kept: bool):
        self.directory = directory
        self._is_kept = is_kept
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], output: str = "log") -> subprocess.Popen[bytes]:
        """Starts a process with stdout into the file `output`, and stderr into `log`."""
        with (self.directory / output).open("ab") as stdout, (self.directory / "log").open("ab") as stderr:
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
            except OSError as error:
                raise TrainingError(f"cannot start `{command[0]}`: {error.strerror}") from error
        return self._process

    def run(self, command: Sequence[str]) -> None:
        """Runs a process to its end; raises TrainingError if its exit code is not 0."""
        self.start(command).wait()
        self.refuse_failure()

    def refuse_failure(self) -> None:
        """Raises TrainingError if the last process has failed."""
        code = self._process.poll() if self._process else None
        if code:
            lines = (self.directory / "log").read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            error = TrainingError("\n  ".join([f"the training ended with exit code {code}:", *lines]))
            error.exit_code = 2 if code == 2 else 1  # an impossible recipe
            raise error

    def kill(self) -> None:
        """Sends SIGKILL to the running process, if any, and its descendants, as in a power cut; returns when they are gone."""
        _wait_until_gone(self.send_sigkill()[1:])
        if self._process:
            self._process.wait()

    def send_sigkill(self) -> list[psutil.Process]:
        """The first half of `kill`, safe in a signal handler: an interrupted `Popen.wait` holds a lock."""
        if self._process is None or self._process.poll() is not None:
            return []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            # torchrun starts each process in its own session: there is no group to kill
            tree = [root, *root.children(recursive=True)]
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return tree
        return []

    def remove(self) -> None:
        if not self._is_kept:
            shutil.rmtree(self.directory, ignore_errors=True)


def _wait_until_gone(killed: Sequence[psutil.Process]) -> None:
    """Gone, or zombies: the process that adopts orphans, such as PID 1 of a container, may not reap them."""
    deadline = time.monotonic() + GONE_SECONDS
    while any(map(_is_alive, killed)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def trainings_beside(run: Path, is_kept: bool) -> Iterator[Trainings]:
    """Trainings in `<run>.rehearsal`, on the disk of the run. SIGTERM, SIGINT and SIGHUP clean up and end this process."""
    directory = run.with_name(f"{run.name}.rehearsal")
    with failures(directory.parent, RunError):
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir()
        except FileExistsError:
            hint = "remove it, unless another rehearsal is under way"
            raise RunError("is left of another rehearsal", where=str(directory), hint=hint) from None
    trainings = Trainings(directory, is_kept)

    def end(number: int, frame: FrameType | None) -> None:
        _wait_until_gone(trainings.send_sigkill())
        trainings.remove()
        os._exit(128 + number)  # not an exception: raised inside a library's import, it would turn into another one

    previous = {number: signal.signal(number, end) for number in ending_signals()}
    try:
        yield trainings
    finally:
        trainings.kill()
        trainings.remove()
        for number, handler in previous.items():
            signal.signal(number, handler)
