"""The process for containers and schedulers: starts the ranks of a training, forwards every signal, and returns their exit code.

It uses neither `accelerate launch` nor torchrun's agent. The first dies on SIGTERM as PID 1, or leaves its training behind. The second
signals twice, ignores SIGUSR1, and hides the ranks' exit code. You can still start a training with both (docs/resume.md).
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import psutil

from finetune.errors import DivergedError, LostRankError
from finetune.hosts.ranks import Ranks
from finetune.hosts.signals import ending_signals
from finetune.hosts.world import Flags, World, devices_here, world_of

BETWEEN_STARTS_SECONDS = 2.0
SET_CHILD_SUBREAPER = 36  # of prctl(2)
PASSING = (LostRankError.code, DivergedError.code)
"""Errors without a fix by you: a restart from the last commit may succeed."""


def launch(asked: Flags, arguments: Sequence[str], run: Path, restarts: int, grace_seconds: float) -> NoReturn:
    """Trains `run` with `finetune train ARGUMENTS` and ends as the ranks do: 0, 143, 130 or 129 after a signal, 1 or 2 after an error.
    Restarts a crash from the last commit, at most `restarts` times, but not an error you have to fix."""
    world = world_of(asked, os.environ, devices_here(os.environ))
    ranks, strangers = Ranks(run, grace_seconds), _children()  # a shell may have started some before it became this
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)  # orphans of ranks become ours, also where this is not PID 1
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored nothing can be waited for
    for number in (*ending_signals(), signal.SIGUSR1):
        signal.signal(number, ranks.forward)
    signal.signal(signal.SIGALRM, ranks.kill)
    _say(_described(world))
    command = [sys.executable, "-m", "finetune", "train", *arguments]
    for left in reversed(range(restarts + 1)):
        ranks.start(world and replace(world, port=world.port or _free_port()), command)
        ranks.wait()
        told = ranks.told()
        others = {local for local, code in told.items() if code == LostRankError.code} | (ranks.killed - told.keys())
        is_to_mend = any(code not in PASSING for code in told.values())
        failed, code = _outcome(ranks.codes, others, ranks.stopped_by)
        is_asked = ranks.stopped_by is not None or code - 128 in ending_signals()  # of the launcher, or of a rank
        if code == 0 or is_asked or is_to_mend or not left:
            break
        rank = world.node * world.processes + failed if world else os.environ["RANK"]
        what = "lost another rank" if failed in others else f"crashed ({_of_code(code)})"
        _say(f"launch: rank {rank} {what}; starting again from the last commit, {left} more times at most")
        time.sleep(BETWEEN_STARTS_SECONDS)
        if ranks.stopped_by is not None:  # meanwhile
            code = 128 + ranks.stopped_by
            break
    _reap(ranks.seconds_left, strangers)
    sys.exit(code)


def _outcome(codes: Mapping[int, int], others: Set[int], stopped_by: int | None) -> tuple[int, int]:
    """The rank whose exit code counts for all: the first that crashed or was killed, preferably none of `others`, which failed because
    of it; else one that followed the signal, or ended well."""
    asked = 128 + stopped_by if stopped_by is not None else None
    exits = {rank: 128 - code if code < 0 else code for rank, code in codes.items()}
    failed = [rank for rank, code in exits.items() if code not in (0, asked)]
    followed = [rank for rank, code in exits.items() if code]
    chosen = next(iter([*(rank for rank in failed if rank not in others), *failed, *followed, *exits]))
    return chosen, exits[chosen]


def _of_code(code: int) -> str:
    names = {128 + number: number.name for number in signal.Signals}
    return f"killed by {names[code]}" if code in names else f"exit code {code}"


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _reap(seconds: float, strangers: Set[int]) -> None:
    """Waits for processes the ranks left behind, such as the publisher of milestones: they end with PID 1."""
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # 0 would be no limit
    try:
        while _children() - strangers:
            os.waitpid(-1, 0)
    except (ChildProcessError, TimeoutError):
        pass  # no process is left, or no time
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


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
