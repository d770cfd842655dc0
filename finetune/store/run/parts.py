"""The Parquet files in `rows/`, `modules/` and `experts/`: written a save at a time, merged so that their number stays small, read a
step at a time.

A file is named by its steps, without gaps. If several files hold a step, the later attempt's counts, and of one attempt the later
file. A merge keeps this order: it takes in the file that ends right before it, unless a newer one lies in between.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.errors import RunError
from finetune.store.durable import failures, make_directory, replace_file
from finetune.store.run import journal, scan
from finetune.store.run.directory import part_name, steps_of_part
from finetune.store.run.records import EventRecord

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SEALED_BYTES = 8 << 20  # a file of this size is merged no more: what a merge reads and writes is bounded
ROW_GROUP = 1 << 14  # rows that are read to find those of one step


class Part(NamedTuple):
    """A file with its first and last step."""

    path: Path
    first: int
    last: int

    def meets(self, first: int, last: int) -> bool:
        """Whether it holds one of these steps."""
        return self.first <= last and first <= self.last


def parts(directory: Path) -> list[Part]:
    """The files of a directory, read from their names."""
    found = [(path, steps_of_part(path.name)) for path in sorted(directory.glob("*.parquet"))]
    return [Part(path, *steps) for path, steps in found if steps]


def write(directory: Path, steps: Sequence[int], table: "pa.Table", attempt: str) -> None:
    """Writes the records of steps, in order, durably, and merges earlier files into the new one. After a crash in between, some of
    these are still there, but no longer count."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    first, last = steps[0], steps[-1]
    is_whole = len(set(steps)) == last - first + 1
    with failures(directory, RunError):
        make_directory(directory)
        merged, shadowed = _mergeable(directory, first, last, attempt) if is_whole else ([], [])
        tables = [_whole(part.path) for part in merged]
        if any(not each.schema.equals(table.schema) for each in tables):  # another version's columns
            merged, shadowed, tables = [], [], []
        first = merged[0].first if merged else first
        whole = pa.concat_tables([*tables, table]).replace_schema_metadata({"attempt": attempt, "time": journal.now()})
        sink = pa.BufferOutputStream()
        parquet.write_table(whole, sink, compression="zstd", row_group_size=ROW_GROUP)
        path = directory / part_name(first, last)
        replace_file(path, sink.getvalue())
        for part in [*merged, *shadowed]:
            if part.path != path:
                part.path.unlink(missing_ok=True)


def _whole(path: Path) -> "pa.Table":
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:  # `parquet.read_table` loads pandas
        return file.read()


def _mergeable(directory: Path, first: int, last: int, attempt: str) -> tuple[list[Part], list[Part]]:
    """The files to merge into a new one of these steps, oldest first, and files that then no longer count.

    It merges a file with fewer than twice as many steps as the new one so far. So each record is rewritten only a few times, and
    n saves leave about log2(n) files.
    """
    known, begun = parts(directory), first
    merged: list[Part] = []
    age = Ages(directory.parent)
    while True:
        before = [part for part in known if part.last == first - 1]
        part = max(before, key=age) if len(before) > 1 else before[0] if before else None
        if part is None or part.last - part.first + 1 >= 2 * (last - first + 1):
            break
        if part.path.stat().st_size >= SEALED_BYTES:
            break
        others = [each for each in known if each not in merged and each != part and each.meets(part.first, last)]
        if any(age(each) > age(part) for each in others):
            break
        merged.insert(0, part)
        first = part.first
    inside = [part for part in known if part not in merged and first <= part.first and part.last <= last]
    if any(age.place(attempt) < age(part)[0] for part in inside if part.last >= begun):
        return [], []
    return merged, inside


class Ages:
    """The age of files; reads the journal on first use."""

    def __init__(self, run: Path):
        self._run = run
        self._known: dict[Path, tuple[float, str]] = {}

    def __call__(self, part: Part) -> tuple[float, str]:
        """A later file has a greater one."""
        import pyarrow.parquet as parquet

        if part.path not in self._known:
            metadata = parquet.read_schema(part.path).metadata or {}
            attempt, time = (metadata.get(key, b"").decode() for key in (b"attempt", b"time"))
            self._known[part.path] = (self._attempts.get(attempt, -1), time)
        return self._known[part.path]

    def place(self, attempt: str) -> float:
        """The age for the attempt that writes now: the latest, unless the journal has another."""
        return self._attempts.get(attempt, math.inf)

    @cached_property
    def _attempts(self) -> dict[str, int]:
        return scan.attempts(self._run)


class Reader:
    """The files of a directory, for many steps: of the last one, the group of rows around a step stays in memory."""

    def __init__(self, directory: Path, rollbacks: Callable[[], Sequence[EventRecord]]):
        self._directory = directory
        self._rollbacks = rollbacks
        self._forget()

    def of(self, step: int) -> list[dict[str, Any]]:
        """The records of a step; empty if no file has them, or a later rollback took them back."""
        for _ in range(3):
            try:
                return self._of(step)
            except FileNotFoundError:  # a training merged it meanwhile
                self._forget()
        return self._of(step)

    def whole(self, first: int, last: int) -> Iterator[tuple["np.ndarray", dict[str, "np.ndarray"]]]:
        """The steps from the first to the last one and their columns of numbers, a file at a time, the latest first; each step from the file
        that counts. FileNotFoundError if a training merges a file meanwhile."""
        import numpy as np
        import pyarrow.parquet as parquet

        self._forget()
        is_taken = np.zeros(last - first + 1, dtype=bool)
        covering = [part for part in self._parts if part.meets(first, last)]
        for part in sorted(covering, key=self._age, reverse=True):
            with parquet.ParquetFile(part.path) as file:
                columns = {
                    name: column.to_numpy() for name, column in zip(file.schema_arrow.names, file.read(), strict=True)
                }
            steps = columns.pop("step")
            counts = (first <= steps) & (steps <= last)
            for record in self._rollbacks():
                if self._age(part)[1] < record["time"]:
                    counts &= steps <= record["to"]
            counts[counts] = ~is_taken[steps[counts] - first]
            is_taken[steps[counts] - first] = True
            yield steps[counts], {name: column[counts] for name, column in columns.items()}

    def _forget(self) -> None:
        self._parts = parts(self._directory)
        self._age = Ages(self._directory.parent)
        self._chosen: dict[tuple[tuple[Part, ...], str], Part | None] = {}
        self._spans: dict[Path, list[tuple[int, int]]] = {}
        self._held: tuple[tuple[Path, tuple[int, ...]], pa.Table] | None = None

    def _of(self, step: int) -> list[dict[str, Any]]:
        covering = tuple(part for part in self._parts if part.meets(step, step))
        given_up = [record["time"] for record in self._rollbacks() if record["to"] < step] if covering else []
        key = (covering, given_up[-1] if given_up else "")
        if key not in self._chosen:
            self._chosen[key] = self._newest(*key)
        part = self._chosen[key]
        return self._read(part.path, step) if part else []

    def _newest(self, covering: Sequence[Part], after: str) -> Part | None:
        """The file of the latest attempt, and of one attempt the latest."""
        if len(covering) == 1 and not after:
            return covering[0]
        fresh = [part for part in covering if self._age(part)[1] >= after]
        return max(fresh, key=self._age, default=None)

    def _read(self, path: Path, step: int) -> list[dict[str, Any]]:
        import numpy as np
        import pyarrow.parquet as parquet

        if path not in self._spans:
            self._spans[path] = _spans(parquet.read_metadata(path))
        groups = tuple(place for place, (low, high) in enumerate(self._spans[path]) if low <= step <= high)
        if not groups:
            return []
        if self._held is None or self._held[0] != (path, groups):
            with parquet.ParquetFile(path) as file:
                self._held = ((path, groups), file.read_row_groups(list(groups)))
        table = self._held[1]
        places = np.flatnonzero(table.column("step").to_numpy() == step)
        if not len(places):
            return []
        return table.slice(places[0], places[-1] - places[0] + 1).to_pylist()


def _spans(metadata: "pa.parquet.FileMetaData") -> list[tuple[int, int]]:
    """The first and the last step of each group of rows."""
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    steps = [group.column(0).statistics for group in groups]  # `step` is the first column
    return [(each.min, each.max) for each in steps]
