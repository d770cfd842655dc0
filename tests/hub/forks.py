"""Commands of a user of the loopback Hub that are killed while they run."""

import os
import signal
import sys
import threading
from pathlib import Path

from tests import forks
from tests.hub.client import environment
from tests.hub.server import Hub

# A command that is killed at its so many-th change below a folder.
ARMED = """
import itertools, os, signal, sys
under, change, *arguments = sys.argv[1:]
seen = itertools.count()

def hook(name, arguments):
    is_change = name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    is_change |= name == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    is_there = any(str(one).startswith(under) for one in arguments[:2])
    is_there |= name in ("os.remove", "os.rmdir") and arguments[1] != -1  # of a tree: the names are relative to a folder
    if is_change and is_there and next(seen) == int(change):
        os.kill(os.getpid(), signal.SIGKILL)

sys.argv = ["finetune", *arguments]
sys.addaudithook(hook)
from finetune.cli import main
main()
"""


class Forks:
    """Commands against one Hub, one after the other."""

    def __init__(self, hub: Hub, home: Path, token: str):
        self.said = home / "said.txt"
        self._env = environment(hub, home, HF_TOKEN=token)
        self._child, self._is_known = 0, threading.Event()

    def run(self, *arguments: object, under: object = "", change: int | None = None) -> int:
        words = ["-m", "finetune"] if change is None else ["-c", ARMED, str(under), str(change)]
        self._is_known.clear()
        with self.said.open("w") as said:
            command = [sys.executable, *words, *map(str, arguments)]
            child = forks.Popen(command, env=self._env, stdin=forks.DEVNULL, stdout=said, stderr=said)
        self._child = child.pid
        self._is_known.set()
        return child.wait()

    def kill(self) -> None:
        """From the thread of a request, which may come before the number of the process that made it."""
        self._is_known.wait()
        os.kill(self._child, signal.SIGKILL)
