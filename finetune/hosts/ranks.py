"""The ranks of a training on this host: starts them, signals each once, waits for them, and kills those that do not end."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finetune.hosts.world import TOLD, World, cores
from finetune.store.run.directory import RunDirectory

AFTER_A_CRASH_SECONDS = 5.0  # for the other ranks to see it themselves, and to say so
BETWEEN_LOOKS_SECONDS = 0.5
SET_PDEATHSIG = 1  # of prctl(2)
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_OTHER_LAUNCHERS = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")
"""Prefixes of other variables that torch or Accelerate obey."""


class Ranks:
    """The processes of this host, alive or ended, and the signal that ended them, if any."""

    def __init__(self, run: Path, grace_seconds: float):
        self.run = run
        self.grace_seconds = grace_seconds
        self.stopped_by: int | None = None
        self.codes: dict[int, int] = {}
        """Exit code by local rank, in the order of their ends; negative for a signal."""
        self.killed: set[int] = set()
        """Local ranks killed here, after a crash or at the end of their grace."""
        self._ranks: dict[int, int] = {}
        """Local rank by pid."""
        self._writer: int | None = None
        """The pid of rank 0, if it is on this host."""
        self._told: dict[int, int] = {}
        """The pipe with the error codes of each local rank."""
        self._left: set[Path] = set()
        """Saves that were cut short before this start."""
        self._deadline: float | None = None
        """When to kill the living ranks, even during a save, on the clock `time.monotonic`; None until the end is asked for."""

    def start(self, world: World | None, command: Sequence[str]) -> None:
        self.codes, self.killed, self._ranks, self._writer = {}, set(), {}, None
        self._left = set(RunDirectory(self.run).saves())
        if self.stopped_by is None:
            self._deadline = None
        inherited = {
            name: value
            for name, value in os.environ.items()
            if world is None or (name not in OF_RANKS and not name.startswith(OF_OTHER_LAUNCHERS))
        }
        for local in range(world.processes if world else 1):
            placed = _rank(world, local) if world and world.size > 1 else {}  # one process needs no other
            self._told[local], told = os.pipe()
            environment = {**inherited, **placed, TOLD: str(told)}
            child = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=_begin_rank, pass_fds=[told]
            )
            os.close(told)
            child.returncode = 0  # it is waited for below, with everybody else
            self._ranks[child.pid] = local
            if world and world.node == local == 0:
                self._writer = child.pid
        if self.stopped_by is not None:  # it came while they were started
            self._send(self.stopped_by)

    def told(self) -> dict[int, str]:
        """The codes of the errors reported by ranks, after all have ended."""
        return {local: code for local, told in self._told.items() if (code := _read(told))}

    @property
    def alive(self) -> list[int]:
        return [pid for pid, rank in self._ranks.items() if rank not in self.codes]

    @property
    def seconds_left(self) -> float:
        """Seconds left of the grace; all of it if it has not begun."""
        return self.grace_seconds if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def forward(self, number: int, frame: object = None) -> None:
        """Sends it once to each rank. A signal to end starts their grace."""
        if number != signal.SIGUSR1 and self.stopped_by is None:
            self.stopped_by = number
            self._begin_grace(self.grace_seconds)
        self._send(number)

    def kill(self, *_: object) -> None:
        """Kills the living ranks; after a crash it first waits for the running save, or for the end of the grace."""
        may_save = self.stopped_by is None and self._writer in self.alive
        if may_save and self.seconds_left and set(RunDirectory(self.run).saves()) - self._left:
            signal.setitimer(signal.ITIMER_REAL, BETWEEN_LOOKS_SECONDS)
            return
        self.killed |= {self._ranks[pid] for pid in self.alive}
        self._send(signal.SIGKILL)

    def wait(self) -> None:
        """Returns when every rank has ended; reaps orphans as well. A crashed rank ends the others: they would wait for it in vain."""
        while self.alive:
            pid, status = os.waitpid(-1, 0)
            if pid not in self._ranks:
                continue
            self.codes[self._ranks[pid]] = code = os.waitstatus_to_exitcode(status)
            if code and self._deadline is None:
                self._begin_grace(AFTER_A_CRASH_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _begin_grace(self, first_look_seconds: float) -> None:
        self._deadline = time.monotonic() + self.grace_seconds
        signal.setitimer(signal.ITIMER_REAL, first_look_seconds)

    def _send(self, number: int) -> None:
        for pid in self.alive:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it has ended, and is not reaped yet
                continue


def _read(told: int) -> str:
    os.set_blocking(told, False)
    try:
        return os.read(told, 100).decode()
    except BlockingIOError:  # nothing was told, and a process that the rank has left behind might yet
        return ""
    finally:
        os.close(told)


def _begin_rank() -> None:
    """Runs in a rank before Python starts. A killed launcher sends the rank SIGTERM, so it commits first. An early SIGUSR1 is ignored:
    there is nothing to save yet."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _rank(world: World, local: int) -> dict[str, str]:
    """The variables torch reads."""
    threads = max(1, cores() // world.processes)
    return {
        "RANK": str(world.node * world.processes + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.processes),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # at every start DDP warns each rank of an option that `state` needs
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
