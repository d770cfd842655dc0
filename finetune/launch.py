"""Floor 7. The process that a container or a scheduler starts: it starts the ranks of a training, hands on every signal, and answers with their code.

Neither `accelerate launch` nor torchrun's agent is in between: the one dies on SIGTERM as PID 1 or leaves its training behind, the other
signals twice, does not know SIGUSR1, and hides the ranks' exit code. Both still start a training, for those who use them (docs/resume.md).
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from finetune.errors import FinetuneError, ending_signals

PORTS = range(20_000, 30_000)
AFTER_A_CRASH_SECONDS = 5  # the other ranks have so long to see it themselves, and to say so
BETWEEN_STARTS_SECONDS = 2.0
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
TOLD = "FINETUNE_TOLD"
"""The file in which a rank notes that it failed with an error that a user has to mend."""


@dataclass(frozen=True)
class World:
    """The processes of a training: `processes` on each of `nodes` hosts, of which this is number `node`; they meet at `address`."""

    processes: int
    why: str
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    """Where rank 0 listens; None on one host, where a free one is taken."""

    @property
    def size(self) -> int:
        return self.nodes * self.processes


def world_of(asked: Mapping[str, object], environment: Mapping[str, str], devices: int) -> World | None:
    """Who trains together: what the flags say, else what the scheduler says, else a process for each device. None for a process that
    a launcher has started already, as one of its ranks.

    FinetuneError where the flags or the environment say half of what several hosts need.
    """
    flags = {key: value for key, value in asked.items() if value is not None}
    of_launcher = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    if not flags and len(of_launcher) == 3:
        return None
    found = _of_scheduler(environment, devices)
    if found and not flags:
        return found
    if of_launcher and not flags:
        hint = "a launcher sets RANK, LOCAL_RANK and WORLD_SIZE: unset them, or say by flags who trains together"
        raise FinetuneError(f"has {' and '.join(of_launcher)} alone", where="environment", hint=hint)
    world = found or World(max(devices, 1), f"{devices} devices here" if devices else "no GPU here")
    world = replace(world, **flags, **({"why": "as the flags say"} if flags else {}))
    if world.nodes > 1 and (world.port is None or world.address == "127.0.0.1"):
        hint = "give --master-addr and --master-port, the same on all hosts, and --node-rank"
        raise FinetuneError(f"{world.nodes} hosts have to know where to meet", where="--nnodes", hint=hint)
    if not 0 <= world.node < world.nodes:
        message = f"{world.node} is not one of {world.nodes} hosts, which are counted from 0"
        raise FinetuneError(message, where="--node-rank", hint="give each host another one")
    return world


def _of_scheduler(environment: Mapping[str, str], devices: int) -> World | None:
    """What Kubernetes' training operator (PET_…) or Slurm says of several hosts or tasks."""
    try:
        if "PET_NNODES" in environment:
            each = environment.get("PET_NPROC_PER_NODE", "auto")
            return World(
                processes=int(each) if each.isdecimal() else max(devices, 1),
                why="Kubernetes' PET_NNODES",
                nodes=int(environment["PET_NNODES"].partition(":")[0]),
                node=int(environment.get("PET_NODE_RANK", environment.get("RANK", "0"))),
                address=environment.get("PET_MASTER_ADDR", environment.get("MASTER_ADDR", "127.0.0.1")),
                port=int(environment.get("PET_MASTER_PORT", environment.get("MASTER_PORT", PORTS[0]))),
            )
        if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
            tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
            if tasks > nodes:
                hint = "ask Slurm for one task a host (--ntasks-per-node=1): its GPUs get a process each"
                raise FinetuneError(f"{tasks} tasks on {nodes} hosts", where="SLURM_NTASKS", hint=hint)
            if "SLURM_STEP_ID" not in environment:  # in the batch script, task 0 of all: nothing starts the others
                message = f"{nodes} hosts, started without srun"
                raise FinetuneError(message, where="SLURM_NNODES", hint="put `srun` before it: srun finetune launch …")
            listed = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
            return World(
                processes=max(devices, 1),
                why="Slurm's SLURM_NNODES",
                nodes=nodes,
                node=int(environment["SLURM_PROCID"]),
                address=first_host(listed),
                port=PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(PORTS)],
            )
    except ValueError as error:
        hint = "correct what the scheduler sets, or give the flags"
        raise FinetuneError(f"a number was expected: {error}", where="environment", hint=hint) from None
    return None


def first_host(listed: str) -> str:
    """The first of Slurm's list of hosts, like `gpu[007-012,20],cpu1`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", listed)
    if not match:
        raise FinetuneError("names no host", where="SLURM_JOB_NODELIST", hint="give --master-addr")
    return "".join(part or "" for part in match.groups())


def devices_here(environment: Mapping[str, str], place: Path = Path("/dev")) -> int:
    """NVIDIA's devices as the driver shows them, or as many as CUDA_VISIBLE_DEVICES lets through; torch is not imported for it."""
    found = len([path for path in place.glob("nvidia*") if path.name[6:].isdecimal()])
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return min(found, len([one for one in visible.split(",") if one.strip()])) if visible is not None else found


class Ranks:
    """The processes of this host, alive or ended; and the signal that asked for the end, if one did."""

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.stopped_by: int | None = None
        self.codes: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        """Rank by pid."""

    def start(self, world: World | None, command: Sequence[str], told: Path) -> None:
        self.codes, self._ranks = {}, {}
        inherited = {name: value for name, value in os.environ.items() if world is None or name not in OF_RANKS}
        for local in range(world.processes if world else 1):
            placed = _rank(world, local) if world and world.size > 1 else {}  # one process needs no other
            environment = {**inherited, **placed, TOLD: str(told / str(local))}
            child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_launcher)
            child.returncode = 0  # it is waited for below, with everybody else
            self._ranks[child.pid] = local
        if self.stopped_by is not None:  # it came while they were started
            self._send(self.stopped_by)

    @property
    def alive(self) -> list[int]:
        return [pid for pid, rank in self._ranks.items() if rank not in self.codes]

    def forward(self, number: int, frame: object = None) -> None:
        """Once to each; after a wish to end they have their grace."""
        if number != signal.SIGUSR1 and self.stopped_by is None:
            self.stopped_by = number
            signal.setitimer(signal.ITIMER_REAL, self.grace_seconds)
        self._send(number)

    def kill(self, *_: object) -> None:
        self._send(signal.SIGKILL)

    def wait(self) -> None:
        """Until every rank has ended, reaping orphans as well. One that crashed takes the others with it: they wait for it in vain."""
        while self.alive:
            pid, status = os.waitpid(-1, 0)
            if pid not in self._ranks:
                continue
            self.codes[self._ranks[pid]] = code = os.waitstatus_to_exitcode(status)
            if code and self.alive and self.stopped_by is None:
                signal.setitimer(signal.ITIMER_REAL, AFTER_A_CRASH_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _send(self, number: int) -> None:
        for pid in self.alive:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it has ended, and is not reaped yet
                continue


def _end_with_launcher() -> None:
    """In a rank: a launcher that is killed takes its ranks along, and they commit first."""
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGTERM)


def _rank(world: World, local: int) -> dict[str, str]:
    """The variables that torch.distributed reads."""
    threads = max(1, len(os.sched_getaffinity(0)) // world.processes)
    return {
        "RANK": str(world.node * world.processes + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.processes),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def launch(asked: Mapping[str, object], arguments: Sequence[str], restarts: int, grace_seconds: float) -> NoReturn:
    """Trains with `finetune train ARGUMENTS` and ends as the ranks do: 0, 143, 130 or 129 after a signal, 1 or 2 after an error. A crash is
    begun again from the last commit, at most `restarts` times; an error that a user has to mend is not."""
    world = world_of(asked, os.environ, devices_here(os.environ))
    ranks = Ranks(grace_seconds)
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)  # orphans of ranks become ours, also where this is not PID 1
    for number in (*ending_signals(), signal.SIGUSR1):
        signal.signal(number, ranks.forward)
    signal.signal(signal.SIGALRM, ranks.kill)
    _say(_described(world))
    command = [sys.executable, "-m", "finetune", "train", *arguments]
    for left in reversed(range(restarts + 1)):
        with tempfile.TemporaryDirectory() as folder:
            ranks.start(world and replace(world, port=world.port or _free_port()), command, Path(folder))
            ranks.wait()
            told = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        code = _code(list(ranks.codes.values()), ranks.stopped_by)
        if code == 0 or ranks.stopped_by is not None or told or not left:
            break
        _say(f"a rank crashed ({code}); starting again from the last commit, {left} more times at most")
        time.sleep(BETWEEN_STARTS_SECONDS)
        if ranks.stopped_by is not None:  # meanwhile
            break
    _reap(grace_seconds)
    sys.exit(code)


def _code(codes: Sequence[int], stopped_by: int | None) -> int:
    """One for all: that of the first rank that crashed or had to be killed, else that of the signal which all followed, or 0."""
    failed = [128 - code if code < 0 else code for code in codes if code]
    asked = 128 + stopped_by if stopped_by is not None else None
    return next((code for code in failed if code != asked), failed[0] if failed else 0)


def _reap(seconds: float) -> None:
    """Waits for what the ranks left behind, such as the process that publishes milestones: the end of PID 1 would end it."""
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        while True:
            os.waitpid(-1, 0)
    except (ChildProcessError, TimeoutError):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end(*_: object) -> NoReturn:
    raise TimeoutError


def _described(world: World | None) -> str:
    if world is None:
        return f"launch: this is rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} of another launcher"
    host = f" on host {world.node} of {world.nodes}, meeting at {world.address}:{world.port}" if world.nodes > 1 else ""
    return f"launch: {world.processes} {'process' if world.processes == 1 else 'processes'}{host} ({world.why})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
