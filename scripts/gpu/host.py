"""Commands on the host that is accepted: each within the time that is left, its output kept, nothing of it left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shapes import Workshop

KEPT_CHARACTERS = 6000  # of what each command said
LEAST_SECONDS = 5
ROOM_BYTES = 45e9  # two saves of the middle shape, and a little


class OutOfTime(Exception):
    """The time of this call is over; what was being done is done again by the next one."""


class Failed(Exception):
    """Something that an item needs could not be made."""


class Done(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float

    @property
    def reason(self) -> str:
        """The end of what a failed command said."""
        return (self.err.strip() or self.out.strip())[-1200:]


class Host:
    def __init__(self, out: Path, work: Path, seconds: float, is_tiny: bool):
        self.out = out
        self.work = work
        self.workshop = Workshop(work, is_tiny)
        self.is_tiny = is_tiny
        self._ends = time.monotonic() + seconds
        for directory in (out, work):
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()

    def run(self, command: Sequence[object], limit: float, extra: Mapping[str, str] | None = None) -> Done:
        """Runs a command to its end. Code 124 when it took longer than its limit; OutOfTime when this call has no more."""
        started, allowed = time.monotonic(), min(limit, self.left)
        if allowed < LEAST_SECONDS:
            raise OutOfTime
        process = self.start(command, extra)
        try:
            out, err = process.communicate(timeout=allowed)
            code = process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            out, err = process.communicate()
            if allowed < limit:
                raise OutOfTime from None
            code = 124
        done = Done(code, out, err, round(time.monotonic() - started, 1))
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            said = "\n".join(text[-KEPT_CHARACTERS:] for text in (out, err))
            log.write(f"\n$ {' '.join(map(str, command))[:300]}\n-> {code} in {done.seconds} s\n{said}\n")
        return done

    def start(self, command: Sequence[object], extra: Mapping[str, str] | None = None) -> subprocess.Popen:
        """A process in its own session, so that its children end with it."""
        own = {
            "HF_HUB_OFFLINE": "1",
            "FINETUNE_CACHE": str(self.work / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **own, **(extra or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def base(self, name: str) -> Path:
        """The directory of a random model, made unless it is there. On a small disk it takes the place of the others."""
        directory = self.workshop.base(name)
        if not self.is_tiny and shutil.disk_usage(self.work).free < ROOM_BYTES:
            for other in directory.parent.glob("*"):
                if other != directory:
                    shutil.rmtree(other)
        if not (directory / "made").exists():
            size = ["tiny"] if self.is_tiny else []
            done = self.run([sys.executable, Path(__file__).parent / "shapes.py", self.work, name, *size], 240)
            if done.code:
                raise Failed(done.reason)
        return directory

    def answer(self, command: Sequence[object], limit: float, extra: Mapping[str, str] | None = None) -> dict:
        """What a script of ours wrote into the file that is its last argument; `error` where it failed."""
        file = self.work / "answer.json"
        file.unlink(missing_ok=True)
        done = self.run([*command, file], limit, extra)
        if done.code or not file.exists():
            return {"ok": False, "code": done.code, "error": done.reason, "seconds": done.seconds}
        return {"ok": True, **json.loads(file.read_bytes()), "seconds": done.seconds}


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
