"""How long a training may be silent, in `silence.json`: its own steps, evaluations and saves tell, and it writes that down.

Whoever asks whether it hangs compares one number with the clock. The file is not synced: it is about a process that lives.
"""

import json
import os
import statistics
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypedDict, Unpack

from finetune.store.durable import SLOWEST_DISK, STALL_SECONDS
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import Record

SLOW = 10
"""A training that takes so many times what it usually takes is still slow, not hung."""
RECENT = 100  # pauses that say what is usual
_BYTES = 512


@dataclass(frozen=True)
class Silence:
    """What an attempt says of itself after each record of its journal."""

    attempt: str
    time: str
    """Of its last record."""
    step: int | None = None
    """The last step that it made; before the first one, which may take hours to come, nothing is said of its silence."""
    committed: int | None = None
    may_last_seconds: float = 0.0
    """From `time` on."""
    evaluation_seconds: float = 0.0
    """The usual pause for an evaluation, which the next attempt has to know before it has made one."""
    save_seconds: float = 0.0
    """For so much longer while a save is under way, as the slowest disk takes for it; else 0."""


class _Changes(TypedDict, total=False):
    """Those of a `Silence`."""

    attempt: str
    time: str
    step: int
    committed: int
    may_last_seconds: float
    evaluation_seconds: float
    save_seconds: float


def read(run: Path) -> Silence | None:
    """None where no training of code that writes it has begun."""
    try:
        known = json.loads(RunDirectory(run).silence.read_bytes())
        return Silence(**{name: known[name] for name in Silence.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Watch:
    """Hears every record of an attempt, and writes what follows from it. A disk that is full, or fails, is no matter here."""

    def __init__(self, run: Path):
        self._path = RunDirectory(run).silence
        self._descriptor: int | None = None
        before = read(run)
        evaluation = before.evaluation_seconds if before else _newest_evaluation(run)
        self._pauses = {
            "step": deque[float](maxlen=RECENT),
            "evaluated": deque([evaluation] if evaluation else [], maxlen=RECENT),
        }
        self._now = Silence("", "")
        self._lock = threading.Lock()  # saves are beside the steps

    def hear(self, record: Record) -> None:
        kind = record["event"] if journal.is_event(record) else record["kind"]
        if kind in self._pauses and self._now.attempt == record["attempt"]:
            self._pauses[kind].append(_seconds(self._now.time, record["time"]))
        changes: _Changes = {"attempt": record["attempt"], "time": record["time"]}
        if kind == "step":
            changes["step"] = record["step"]
        if kind == "committed":
            changes["committed"] = record["step"]
        steps, evaluations = (statistics.median(pauses or [0.0]) for pauses in self._pauses.values())
        changes["may_last_seconds"] = round(SLOW * max(steps, evaluations), 1)
        changes["evaluation_seconds"] = round(evaluations, 3)
        self._write(**changes)

    @contextmanager
    def saving(self, count: int) -> Iterator[None]:
        """Around a save of so many bytes: the training may wait for it."""
        self._write(save_seconds=round(STALL_SECONDS + count / SLOWEST_DISK, 1))
        try:
            yield
        finally:
            self._write(save_seconds=0.0)

    def _write(self, **changes: Unpack[_Changes]) -> None:
        """In place, always the same number of bytes: a reader in the middle may see old and new digits, but no torn JSON."""
        with self._lock, suppress(OSError):
            self._now = replace(self._now, **changes)
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                weakref.finalize(self, os.close, self._descriptor)
            os.pwrite(self._descriptor, f"{json.dumps(vars(self._now)):<{_BYTES - 1}}\n".encode(), 0)


def _newest_evaluation(run: Path) -> float:
    """The pause before the newest evaluation of a run whose code did not write this file; 0 without any."""
    pair = journal.newest_pair(run, "evaluated")
    is_one = len(pair) == 2 and pair[0]["attempt"] == pair[1]["attempt"]
    return _seconds(pair[0]["time"], pair[1]["time"]) if is_one else 0.0


def _seconds(before: str, after: str) -> float:
    return (datetime.fromisoformat(after) - datetime.fromisoformat(before)).total_seconds()
