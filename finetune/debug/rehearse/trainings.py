"""Real `finetune` processes in a directory that goes when they have ended; for `rehearse`.

Whatever ends the caller, an error or a signal, no process stays behind and no directory, unless it is to be kept.
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
GONE_SECONDS = 30  # for the kernel to take a killed process away


class TrainingError(FinetuneError):
    """A training of a rehearsal that ended by itself; the message has its last words."""

    code = "rehearsal"


class Trainings:
    """One process after the other; what they say goes into the file `log`."""

    def __init__(self, directory: Path, is_kept: bool):
        self.directory = directory
        self._is_kept = is_kept
        self._process: subprocess.Popen | None = None

    def start(self, command: Sequence[str], output: str = "log") -> subprocess.Popen:
        """Begins a process whose stdout goes into the file `output`, and whose stderr into `log`."""
        with (self.directory / output).open("ab") as stdout, (self.directory / "log").open("ab") as stderr:
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
            except OSError as error:
                raise TrainingError(f"cannot start `{command[0]}`: {error.strerror}") from error
        return self._process

    def run(self, command: Sequence[str]) -> None:
        """A process from start to end; TrainingError where its exit code is not 0."""
        self.start(command).wait()
        self.refuse_failure()

    def refuse_failure(self) -> None:
        """Raises TrainingError when the last process has ended, and not well."""
        code = self._process.poll()
        if code:
            lines = (self.directory / "log").read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            error = TrainingError("\n  ".join([f"the training ended with exit code {code}:", *lines]))
            error.exit_code = 2 if code == 2 else 1  # a recipe that cannot work
            raise error

    def kill(self) -> None:
        """SIGKILL to the process under way, if one is, and to all that it started, as where the power fails; returns when they are gone."""
        _wait_until_gone(self.send_sigkill()[1:])
        if self._process:
            self._process.wait()

    def send_sigkill(self) -> list[psutil.Process]:
        """The first half of `kill`, which a signal handler may call: `Popen.wait`, which it may have interrupted, holds a lock."""
        if self._process is None or self._process.poll() is not None:
            return []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            # torchrun gives each process that it starts a session of its own: there is no group to kill
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
    """Or zombies: whose children orphans become, such as PID 1 of a container, may not reap them."""
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
    """Trainings in `<run>.rehearsal`, on the disk that the run will use. SIGTERM, SIGINT and SIGHUP clear up and end this process."""
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
        os._exit(128 + number)  # not an exception: thrown into a library's import it would become another one

    previous = {number: signal.signal(number, end) for number in ending_signals()}
    try:
        yield trainings
    finally:
        trainings.kill()
        trainings.remove()
        for number, handler in previous.items():
            signal.signal(number, handler)
