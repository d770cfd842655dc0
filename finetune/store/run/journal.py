"""The journal of a run: `journal.jsonl`, one line a step or event.

Only the holder of the run's lease appends. A crash can tear only the last line, and the next writer drops it.
"""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Protocol, TypeGuard, TypeVar, cast

from finetune.errors import RunError
from finetune.plan.facts import Metrics
from finetune.store.durable import failures, sync_directory
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import EventRecord, Record, StepRecord, is_event, is_rollback, is_step
from finetune.store.strict_json import to_json

RecordT = TypeVar("RecordT", bound=Record)

# What differs between two runs of one step, besides durations and rates.
VOLATILE = frozenset({"time", "seconds", "memory_bytes", "attempt"})
_VOLATILE_ENDINGS = ("_time", "_seconds", "_per_second")

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
END_BYTES = 1 << 20  # more than a thousand records


class Listener(Protocol):
    """Gets every record, and anything that may delay the next one."""

    def hear(self, record: Record) -> None: ...

    def saving(self, count: int) -> AbstractContextManager[None]: ...


class Journal:
    """The one writer of a run's journal. Records are `{"kind": "step", "step": k, …}` or `{"kind": "event", "event": …, …}`.

    While the disk is full, records wait in memory: a training must not end because a line does not fit. `sync` raises.
    """

    def __init__(self, run: Path, listener: Listener | None = None):
        self.path = RunDirectory(run).journal
        self._listener = listener
        self._waiting = b""
        self._lock = threading.Lock()  # the loop and the saves beside it both append
        with failures(self.path, RunError):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            data, first = _end_of(self.path)
            if not (sound := _sound_length(data)) and first:
                data, first = self.path.read_bytes(), 0
                sound = _sound_length(data)
            if sound < len(data):
                os.ftruncate(self._descriptor, first + sound)
            os.fsync(self._descriptor)
            sync_directory(run)

    def append(self, record: Record) -> None:
        """One line; durable after the next `sync`."""
        with self._lock, failures(self.path, RunError):
            self._waiting += f"{to_json(record)}\n".encode()
            try:
                self._write_waiting()
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
            if self._listener:
                self._listener.hear(record)

    def saving(self, count: int) -> AbstractContextManager[None]:
        """Use it around a save of `count` bytes: steps may have to wait for it."""
        return self._listener.saving(count) if self._listener else nullcontext()

    def sync(self) -> None:
        """Makes all appended records durable; before each manifest, so that no checkpoint is ahead of its journal."""
        with self._lock, failures(self.path, RunError):
            self._write_waiting()
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        try:
            if self._waiting:
                self.sync()
        finally:
            os.close(self._descriptor)

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        written = os.write(self._descriptor, self._waiting)
        if written < len(self._waiting):  # without its torn end, what comes after can still be read
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""


def event(name: str, attempt: str, **figures: object) -> EventRecord:
    """The record of an event beside the steps, with the time now (UTC)."""
    return cast(EventRecord, {"kind": "event", "event": name, "attempt": attempt, "time": now(), **figures})


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read(run: Path) -> list[Record]:
    """All records of a run, oldest first; a torn last line is skipped, and a broken one before it is a RunError.

    Its memory grows with the steps; `scan` reads runs of any length.
    """
    path = RunDirectory(run).journal
    data = path.read_bytes() if path.exists() else b""
    records = []
    for number, line in enumerate(data[: _sound_length(data)].splitlines(), start=1):
        record = record_of(line)
        if record is None:
            raise broken(path, number)
        records.append(record)
    return records


def broken(path: Path, number: int) -> RunError:
    hint = f"the file is damaged; with lines {number} and after removed, their steps are run again from the last checkpoint before"
    return RunError("is not a record of a journal", where=f"{path}:{number}", hint=hint)


def end_since(run: Path, is_first: Callable[[Record], bool]) -> list[Record] | None:
    """The records from the newest that `is_first` on, or None if the end of the file has none. A long journal costs no more."""
    path = RunDirectory(run).journal
    data, _ = _end_of(path) if path.exists() else (b"", 0)
    records = _all_of(data[: _sound_length(data)].splitlines())
    for place in reversed(range(len(records))):
        if is_first(records[place]):
            return records[place:]
    return None


def newest_pair(run: Path, name: str) -> list[Record]:
    """The newest event of a kind with the record before it, or nothing. Reads a line at a time, so the journal may be long."""
    path, sign = RunDirectory(run).journal, f'"event": "{name}"'.encode()
    before, found = b"", (b"", b"")
    with path.open("rb") if path.exists() else BytesIO() as lines:
        for line in lines:
            if sign in line:
                found = (before, line)
            before = line
    return _all_of(found)


def _all_of(lines: Iterable[bytes]) -> list[Record]:
    """The records of these lines; empty if one is not a record."""
    records = [record_of(line) for line in lines]
    sound = [record for record in records if record is not None]
    return sound if len(sound) == len(records) else []


def steps(records: Iterable[Record]) -> dict[int, StepRecord]:
    """The valid record of each step: the last one, because a step may run again after a crash. Skips records that a rollback took
    back."""
    return _that_count(records, is_step)


def evaluations(records: Iterable[Record]) -> dict[int, Metrics]:
    """The held-out figures of each step that was evaluated, also if a signal stopped the evaluation and a resume repeated it."""
    about = {"kind", "event", "attempt", "time", "step"}
    found = that_count(records, lambda record: record["event"] == "evaluated")
    return {
        step: cast(Metrics, {name: value for name, value in record.items() if name not in about})
        for step, record in found.items()
    }


def that_count(records: Iterable[Record], is_wanted: Callable[[EventRecord], bool]) -> dict[int, EventRecord]:
    """The last wanted event of each step, unless a later rollback took it back."""

    def is_one(record: Record) -> TypeGuard[EventRecord]:
        return is_event(record) and is_wanted(record)

    return _that_count(records, is_one)


def _that_count(records: Iterable[Record], is_wanted: Callable[[Record], TypeGuard[RecordT]]) -> dict[int, RecordT]:
    found: dict[int, RecordT] = {}
    for record in records:
        if is_wanted(record):
            found[record["step"]] = record
        elif is_rollback(record):
            found = {step: each for step, each in found.items() if step < record["first"]}
    return found


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> str | None:
    """The first field in which two records of one step differ, times and attempt aside; None if the step was exact."""
    for key in [*new, *(key for key in old if key not in new)]:
        if key in VOLATILE or key.endswith(_VOLATILE_ENDINGS):
            continue
        if key not in old or key not in new or to_json(old[key]) != to_json(new[key]):
            return key
    return None


def _end_of(path: Path) -> tuple[bytes, int]:
    """The last lines of a file, about `END_BYTES`, and how many bytes are before them."""
    with path.open("rb") as file:
        first = max(0, os.fstat(file.fileno()).st_size - END_BYTES)
        file.seek(first)
        data = file.read()
    torn = data.find(b"\n") + 1 if first else 0
    return data[torn:], first + torn


def _sound_length(data: bytes) -> int:
    """The size of the file without torn lines at its end."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if record_of(data[start:end]) is not None:
            break
        end = start
    return end


def record_of(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(Record, record) if isinstance(record, dict) and "kind" in record else None
