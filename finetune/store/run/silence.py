"""How long a training may be silent, in `silence.json`, computed from its own steps, evaluations and saves.

`health` compares one number with the clock. The file is not synced: it matters only while the process lives.
"""

import json
import os
import statistics
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from finetune.store.durable import SLOWEST_DISK, STALL_SECONDS
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import Record

SLOW = 10
"""A training is slow, not hung, up to this many times its usual time."""
WARNINGS = ("no_gradient", "starving_experts")
"""Events of the journal; older code did not write their steps into the file."""
RECENT = 100  # pauses that say what is usual
_BYTES = 512


@dataclass(frozen=True)
class Silence:
    """The facts of an attempt after each record of its journal."""

    attempt: str
    time: str
    """The time of its last record."""
    step: int | None = None
    """The last finished step. None before the first: there is no bound yet, because it may take hours."""
    committed: int | None = None
    may_last_seconds: float = 0.0
    """Counted from `time`."""
    evaluation_seconds: float = 0.0
    """The usual pause for an evaluation; the next attempt needs it before its first one."""
    save_seconds: float = 0.0
    """How much longer it may be silent during a save, by the speed of the slowest disk; else 0."""
    no_gradient: int | None = None
    """The step of its last event of this kind, which is rare and easily missed; ..."""
    starving_experts: int | None = None
    """... and of this one."""


def read(run: Path) -> Silence | None:
    """None if no training by code that writes the file has begun."""
    try:
        known = json.loads(RunDirectory(run).silence.read_bytes())
        return Silence(
            **{name: known[name] for name in Silence.__dataclass_fields__ if name in known or name not in WARNINGS}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Watch:
    """Gets every record of an attempt, and updates the file. Ignores a full or failing disk."""

    def __init__(self, run: Path):
        self._path = RunDirectory(run).silence
        before = read(run)
        evaluation = before.evaluation_seconds if before else _newest_evaluation(run)
        self._pauses = {
            "step": deque[float](maxlen=RECENT),
            "evaluated": deque([evaluation] if evaluation else [], maxlen=RECENT),
        }
        self._now = Silence("", "")
        self._lock = threading.Lock()  # saves are beside the steps

    def hear(self, record: Record) -> None:
        kind = record["event"] if record["kind"] == "event" else "step"
        with self._lock:
            now = replace(self._now, attempt=record["attempt"], time=record["time"])
            if kind in self._pauses and self._now.attempt == now.attempt:
                self._pauses[kind].append(_seconds(self._now.time, now.time))
            if kind == "step":
                now = replace(now, step=record["step"])
            elif kind == "committed":
                now = replace(now, committed=record["step"])
            elif kind == "no_gradient":
                now = replace(now, no_gradient=record["step"])
            elif kind == "starving_experts":
                now = replace(now, starving_experts=record["step"])
            steps, evaluations = (statistics.median(pauses or [0.0]) for pauses in self._pauses.values())
            limit = round(SLOW * max(steps, evaluations), 1)
            self._write(replace(now, may_last_seconds=limit, evaluation_seconds=round(evaluations, 3)))

    @contextmanager
    def saving(self, count: int) -> Iterator[None]:
        """Use it around a save of `count` bytes: the training may wait for it."""
        with self._lock:
            self._write(replace(self._now, save_seconds=round(STALL_SECONDS + count / SLOWEST_DISK, 1)))
        try:
            yield
        finally:
            with self._lock:
                self._write(replace(self._now, save_seconds=0.0))

    def _write(self, now: Silence) -> None:
        """Writes in place, always the same number of bytes: a concurrent reader may see old and new digits, but no torn JSON."""
        self._now = now
        with suppress(OSError):
            # Opened each time, some microseconds a step: nothing stays open on a disk that is to be unmounted.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(descriptor, f"{json.dumps(vars(now)):<{_BYTES - 1}}\n".encode(), 0)
            finally:
                os.close(descriptor)


def _newest_evaluation(run: Path) -> float:
    """The pause before the newest evaluation of a run by code without this file; 0 if there was none."""
    pair = journal.newest_pair(run, "evaluated")
    if len(pair) < 2 or pair[0]["attempt"] != pair[1]["attempt"]:
        return 0.0
    return _seconds(pair[0]["time"], pair[1]["time"])


def _seconds(before: str, after: str) -> float:
    return (datetime.fromisoformat(after) - datetime.fromisoformat(before)).total_seconds()
