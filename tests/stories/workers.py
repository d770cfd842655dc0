"""Processes that have the libraries imported and train what they are told: only a death costs a start-up.

`Workers` starts one a rank, with the environment that torchrun would give it, and is what tests use. Run as a module,
this file is one of them: it reads a command a line, and answers each with a line that says how its training ended. Long because every
fault that a test does to a rank is here: ranks are told of it by their command.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from tests import forks

ROOT = Path(__file__).parents[2]


class Workers:
    """The ranks of one world. Where one fails or dies all are ended, and the next training starts new ones."""

    def __init__(self, world_size: int, logs: Path, hosts: int = 1):
        self.world_size = world_size
        self._beside = world_size // hosts
        self._logs = [logs / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
        self._processes: list[subprocess.Popen] = []

    def train(
        self,
        recipe: Path,
        run: Path,
        *,
        killed_after: int | None = None,
        signalled: tuple[int, int] | None = None,
        full_disk: tuple[int, int] | None = None,
        unreadable: tuple[int, int] | None = None,
        file_bytes: int | None = None,
        until: int | None = None,
    ) -> str:
        """Starts or resumes the run on all ranks, and returns how it ended: "finished", "killed" or "stopped".

        `killed_after`: the step whose record is the last thing that happens on every rank.
        `full_disk`: a step, and the rank that finds no room for its rows of that step's checkpoint.
        `unreadable`: a step, and the rank for which the disk fails while it reads files of that step's checkpoint back.
        `file_bytes`: the size from which on files of a checkpoint are divided.
        `signalled`: a step, and the rank that gets SIGTERM while the checkpoint of that step is half written.
        """
        if not self._processes:
            self._start()
        step, rank = signalled or (None, 0)
        process_id = self._processes[rank].pid
        command = {
            "recipe": str(recipe),
            "run": str(run),
            "killed_after": killed_after,
            "until": until,
            "full_disk": full_disk,
            "unreadable": unreadable,
            "file_bytes": file_bytes,
        }
        line = json.dumps(command | {"signalled": signalled and (step, process_id)})
        answers = self._ask(line)
        first = answers[0]
        if answers != [first] * self.world_size or not first or first["left"]:
            self.close()
            said = "".join(f"\n{log.name}:\n{log.read_text()[-3000:]}" for log in self._logs)
            raise AssertionError(f"the ranks answered {answers}{said}")
        return first["ended"]

    def _ask(self, line: str) -> list[dict]:
        """The answer of each rank; empty for one that died."""
        try:
            for process in self._processes:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
            return [json.loads(process.stdout.readline() or "{}") for process in self._processes]
        except BaseException:  # the test is cut short: its answers must not be the next one's
            self.close()
            raise

    def close(self) -> None:
        """Ends all ranks."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []

    def _start(self) -> None:
        launched = {}
        if self.world_size > 1:
            local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
            launched = local | {"WORLD_SIZE": str(self.world_size), "LOCAL_WORLD_SIZE": str(self._beside)}
        for rank, log in enumerate(self._logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank % self._beside)} if launched else {}
            with log.open("w") as file:
                process = forks.Popen(
                    [sys.executable, "-m", "tests.stories.workers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | launched | place,
                )
            self._processes.append(process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def two_ranks(*command: object, hosts: list[Path] | None = None) -> list[subprocess.Popen]:
    """What torchrun starts, in the folder of each one's host; on a port that was free a moment ago."""
    return ranks_on_hosts([2], *command, folders=hosts)


def ranks_on_hosts(
    processes: Sequence[int], *command: object, folders: Sequence[Path] | None = None
) -> list[subprocess.Popen]:
    """Those of each host, which a launcher for each of them may start; in the folder of each rank."""
    shared = {"WORLD_SIZE": str(sum(processes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [(beside, rank) for beside in processes for rank in range(beside)]
    return [
        forks.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(beside)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders[number] if folders else None,
        )
        for number, (beside, rank) in enumerate(places)
    ]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it (`test_processes` sends the real one)."""


@contextmanager
def killed(after: int) -> Iterator[None]:
    """Within, a training dies on every rank once the step is recorded."""
    from finetune.training.recorder import Recorder

    record = Recorder.step

    def die(self: Recorder, report: object) -> None:
        record(self, report)
        if report.step == after:
            raise Killed

    with patch.object(Recorder, "step", die):
        yield


@contextmanager
def signalled(step: int, process_id: int) -> Iterator[None]:
    """Within, SIGTERM goes to the process when the first tensors of the step's checkpoint are written, and the rest is not."""
    from finetune.store.checkpoints import assembled
    from finetune.store.checkpoints.store import Attempt

    is_sent = threading.Event()

    def sending(write: Callable[..., object], is_it: Callable[..., bool]) -> Callable[..., object]:
        def send(*arguments: object) -> object:
            written = write(*arguments)
            if is_it(arguments[0]) and not is_sent.is_set():
                is_sent.set()
                os.kill(process_id, signal.SIGTERM)
            return written

        return send

    is_first = os.environ.get("RANK", "0") == "0"
    alone = sending(Attempt.write_tensors, lambda attempt: attempt.step == step)
    rows = sending(assembled.write_rows, lambda path: is_first and f"step-{step:08d}" in str(path))
    with patch.object(Attempt, "write_tensors", alone), patch.object(assembled, "write_rows", rows):
        yield


@contextmanager
def no_room(step: int, rank: int) -> Iterator[None]:
    """Within, a rank's rows of a step's checkpoint find a full disk."""
    from finetune.store.checkpoints import assembled

    write = assembled.write_rows

    def fail(path: Path, made: object) -> list:
        if f"step-{step:08d}" in str(path) and rank == int(os.environ.get("RANK", "0")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, made)

    with patch.object(assembled, "write_rows", fail):
        yield


@contextmanager
def bad_disk(step: int, rank: int) -> Iterator[None]:
    """Within, a rank cannot read files of a step's checkpoint back."""
    from finetune.store.checkpoints import assembled

    read_back = assembled.read_back

    def fail(path: Path, *arguments: object) -> object:
        if f"step-{step:08d}" in str(path) and rank == int(os.environ.get("RANK", "0")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_back(path, *arguments)

    with patch.object(assembled, "read_back", fail):
        yield


@contextmanager
def divided(size: int) -> Iterator[None]:
    """Within, files of a checkpoint have at most so many bytes, or one tensor."""
    from finetune.store.checkpoints import tensor_files

    with patch.object(tensor_files, "FILE_BYTES", size):
        yield


def main() -> None:
    """One rank. Prints of the libraries go to stderr; stdout is for answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import finetune.training.run  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        ended = _train(
            command
        )  # an error ends the process: it would leave the others waiting, now their connection breaks
        answers.write(json.dumps({"ended": ended, "left": _left(Path(command["run"]))}) + "\n")
        answers.flush()


def _train(command: dict) -> str:
    from finetune.errors import Stopped
    from finetune.recipe.load import load
    from finetune.training.run import train

    dies = killed(command["killed_after"]) if command["killed_after"] else nullcontext()
    stops = signalled(*command["signalled"]) if command["signalled"] else nullcontext()
    fails = no_room(*command["full_disk"]) if command["full_disk"] else nullcontext()
    cannot = bad_disk(*command["unreadable"]) if command["unreadable"] else nullcontext()
    size = divided(command["file_bytes"]) if command["file_bytes"] else nullcontext()
    try:
        with dies, stops, fails, cannot, size:
            train(load(Path(command["recipe"])), Path(command["run"]), is_quiet=True, until=command["until"])
    except Killed:
        return "killed"
    except Stopped:
        return "stopped"
    return "finished"


def _left(run: Path) -> list[str]:
    """What a training has not closed, and a dead process would have: files of the run, and threads that write them."""
    files = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            file = descriptor.readlink()
        except FileNotFoundError:  # the one that lists this directory
            continue
        if file.is_relative_to(run):
            files.append(str(file.relative_to(run)))
    return files + [thread.name for thread in threading.enumerate() if thread.name.startswith("writer")]


if __name__ == "__main__":
    main()
