"""Commands of a user of the loopback Hub that are killed while they run: forks of one process, as starting one takes seconds."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.hub.client import environment
from tests.hub.server import Hub

# Commands in forks of a process that has imported everything: each line is {arguments, under, change}, and its answers are the process id
# and then the exit status. A fork is killed at its so many-th change below a folder, where one is named.
FORKS = """
import itertools, json, os, signal, sys
from finetune.cli import main
from finetune.package.publish import publish, queue

def armed(under, change):
    seen = itertools.count()
    def hook(name, arguments):
        is_change = name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        is_change |= name == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        is_there = any(str(one).startswith(under) for one in arguments[:2])
        is_there |= name in ("os.remove", "os.rmdir") and arguments[1] != -1  # of a tree: the names are relative to a folder
        if is_change and is_there and next(seen) == change:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if order["change"] is not None:
            armed(order["under"], order["change"])
        sys.argv, code = ["finetune", *order["arguments"]], 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(repr(error), flush=True)
            code = 99
        sys.stdout.flush()
        os._exit(code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Commands against one Hub, each in a fork."""

    def __init__(self, hub: Hub, home: Path, token: str):
        self.said = home / "said.txt"
        command, env = [sys.executable, "-c", FORKS], environment(hub, home, HF_TOKEN=token)
        self._parent = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._child, self._is_known = 0, threading.Event()

    def run(self, *arguments: object, under: object = "", change: int | None = None) -> int:
        order = {"arguments": [str(one) for one in arguments], "said": str(self.said), "under": str(under)}
        self._is_known.clear()
        self._parent.stdin.write(json.dumps(order | {"change": change}) + "\n")
        self._parent.stdin.flush()
        self._child = int(self._parent.stdout.readline())
        self._is_known.set()
        return int(self._parent.stdout.readline())

    def kill(self) -> None:
        """From the thread of a request, which may come before the number of the process that made it."""
        self._is_known.wait()
        os.kill(self._child, signal.SIGKILL)

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.wait(60)
        self._parent.stdout.close()
