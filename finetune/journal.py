"""Floor 0. What happened in a run: `journal.jsonl`, one line a step or event, and `rows/`, the loss of every row.

The holder of the run's lease appends; `log`, `replay`, `bisect` and resume read. A crash can tear only the last line, which is
dropped when the journal is next opened for writing.
"""

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from finetune.checkpoints.durable import failures, make_directory, replace_file, sync_directory
from finetune.checkpoints.manifest import to_json
from finetune.errors import RunError

# What differs between two runs of one step, besides durations and rates.
VOLATILE = frozenset({"time", "seconds", "attempt"})
_VOLATILE_ENDINGS = ("_time", "_seconds", "_per_second")
_ROWS_NAME = re.compile(r"step-(\d+)-(\d+)\.parquet")


FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
END_BYTES = 1 << 20  # more than a thousand records


class Journal:
    """The one writer of a run's journal. Records are `{"kind": "step", "step": k, …}` or `{"kind": "event", "event": …, …}`.

    While the disk is full, records wait in memory: a training need not end because a line does not fit. `sync` says so.
    """

    def __init__(self, run: Path):
        self.path = run / "journal.jsonl"
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

    def append(self, record: dict[str, object]) -> None:
        """One line; durable after the next `sync`."""
        with self._lock, failures(self.path, RunError):
            self._waiting += f"{to_json(record)}\n".encode()
            try:
                self._write_waiting()
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise

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


def event(name: str, attempt: str, **figures: object) -> dict[str, object]:
    """The record of something that happened beside the steps, at this moment (UTC)."""
    return {"kind": "event", "event": name, "attempt": attempt, "time": now(), **figures}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read(run: Path) -> list[dict[str, object]]:
    """All records of a run, oldest first; a torn last line is left out, and a broken one before it is a RunError."""
    path = run / "journal.jsonl"
    data = path.read_bytes() if path.exists() else b""
    records = []
    for number, line in enumerate(data[: _sound_length(data)].splitlines(), start=1):
        record = _record(line)
        if record is None:
            hint = f"the file is damaged; with lines {number} and after removed, their steps are run again from the last checkpoint before"
            raise RunError("is not a record of a journal", where=f"{path}:{number}", hint=hint)
        records.append(record)
    return records


def read_since(run: Path, is_first: Callable[[dict], bool]) -> list[dict[str, object]]:
    """The records from the newest that `is_first` on; all, where the end of the file has none. How long the journal is costs nothing."""
    path = run / "journal.jsonl"
    data, _ = _end_of(path) if path.exists() else (b"", 0)
    records = [_record(line) for line in data[: _sound_length(data)].splitlines()]
    if None not in records:
        for place in reversed(range(len(records))):
            if is_first(records[place]):
                return records[place:]
    return read(run)


def steps(records: Iterable[dict[str, object]]) -> dict[int, dict[str, object]]:
    """The record that counts for each step: its last one, for a step may have been run again after a crash."""
    return {record["step"]: record for record in records if record["kind"] == "step"}


def evaluations(records: Iterable[dict[str, object]]) -> dict[int, dict[str, object]]:
    """The held-out figures of each step that was evaluated; also of one whose evaluation a signal cut short, and a resume made up."""
    about = {"kind", "event", "attempt", "time", "step"}
    found = [record for record in records if record.get("event") == "evaluated"]
    return {record["step"]: {name: value for name, value in record.items() if name not in about} for record in found}


def difference(old: dict[str, object], new: dict[str, object]) -> str | None:
    """The first field in which two records of one step differ, times and attempt aside; None when the step was exact."""
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
    """How many bytes are left when torn lines are taken from the end."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if _record(data[start:end]) is not None:
            break
        end = start
    return end


def _record(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "kind" in record else None


class RowLoss(NamedTuple):
    """What one example contributed to the loss of a step; `row` is the id of the row that it was made of."""

    step: int
    example: int
    row: int
    loss: float
    tokens: int


def write_rows(run: Path, losses: Sequence[RowLoss], attempt: str) -> None:
    """Writes losses, in the order of their steps, to the columnar file `rows/step-<first>-<last>.parquet`, durably."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = {"step": pa.int64(), "example": pa.int64(), "row": pa.int64(), "loss": pa.float64(), "tokens": pa.int64()}
    columns = zip(*losses, strict=True)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
    sink = pa.BufferOutputStream()
    table = pa.table(arrays, list(types), metadata={"attempt": attempt})
    parquet.write_table(table, sink, compression="zstd")
    path = run / "rows" / f"step-{losses[0].step:08d}-{losses[-1].step:08d}.parquet"
    with failures(path, RunError):
        make_directory(path.parent)
        replace_file(path, sink.getvalue())


def read_rows(run: Path, step: int) -> list[RowLoss]:
    """The row losses of a step, from the last written file that covers it; empty where none does."""
    import pyarrow.parquet as parquet

    covering = [path for path in (run / "rows").glob("*.parquet") if _covers(path.name, step)]
    if not covering:
        return []
    if len(covering) > 1:  # after a fall-back: they agree, or the run has said that exactness is lost
        attempts = [str(record.get("attempt")).encode() for record in read(run)]
        order = {attempt: place for place, attempt in enumerate(attempts)}
        covering.sort(key=lambda path: order.get((parquet.read_schema(path).metadata or {}).get(b"attempt"), -1))
    table = parquet.read_table(covering[-1], filters=[("step", "=", step)])
    return [RowLoss(**item) for item in table.to_pylist()]


def _covers(name: str, step: int) -> bool:
    match = _ROWS_NAME.fullmatch(name)
    return bool(match) and int(match[1]) <= step <= int(match[2])
