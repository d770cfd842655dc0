"""Floor 0. What a run records of each step beside its journal's line, in columns: the loss of every row, and the gradient norm of every
group of modules.

`saver` writes a file of each kind before a commit, so no checkpoint is ahead of its record; `replay`, `bisect` and `show` read.
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from finetune import journal
from finetune.checkpoints.durable import failures, make_directory, replace_file
from finetune.errors import RunError

ROWS, MODULES = "rows", "modules"
_NAME = re.compile(r"step-(\d+)-(\d+)\.parquet")


class RowLoss(NamedTuple):
    """What one example contributed to the loss of a step; `row` is the id of the row that it was made of."""

    step: int
    example: int
    row: int
    loss: float
    tokens: int


class ModuleNorms(NamedTuple):
    """The 2-norm of the gradient of each group of modules in a step, before clipping."""

    step: int
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Columns:
    """The records of some steps, oldest first."""

    rows: list[RowLoss] = field(default_factory=list)
    modules: list[ModuleNorms] = field(default_factory=list)

    def extend(self, later: "Columns") -> None:
        """Takes the records of later steps in."""
        self.rows.extend(later.rows)
        self.modules.extend(later.modules)

    def __add__(self, later: "Columns") -> "Columns":
        return Columns([*self.rows, *later.rows], [*self.modules, *later.modules])

    def write(self, run: Path, attempt: str) -> None:
        """`rows/step-<first>-<last>.parquet` and the same in `modules/`, durably."""
        if self.rows:
            _write(
                run / ROWS, self.rows, dict(zip(RowLoss._fields, zip(*self.rows, strict=True), strict=True)), attempt
            )
        if self.modules:
            names = self.modules[0].norms
            columns = {"step": [item.step for item in self.modules]}
            columns |= {name: [item.norms[name] for item in self.modules] for name in names}
            _write(run / MODULES, self.modules, columns, attempt)


def read_rows(run: Path, step: int) -> list[RowLoss]:
    """The row losses of a step; empty where no file covers it."""
    return Reader(run).rows(step)


def read_modules(run: Path, step: int) -> dict[str, float]:
    """The gradient norms of a step's modules; empty where no file covers it."""
    return Reader(run).modules(step)


class Reader:
    """The columns of a run, for many steps: directories and journal are read once, and the last file stays in memory.

    Of several files that cover a step the last one counts; one that is older than a rollback over the step does not.
    """

    def __init__(self, run: Path):
        self._run = run
        self._files = {name: sorted((run / name).glob("*.parquet")) for name in (ROWS, MODULES)}
        self._steps: dict[str, tuple[Path | None, dict[int, list[dict]]]] = {name: (None, {}) for name in self._files}
        self._chosen: dict[tuple[str, tuple[Path, ...], tuple[str, ...]], Path | None] = {}

    def rows(self, step: int) -> list[RowLoss]:
        return [RowLoss(**item) for item in self._of(ROWS, step)]

    def modules(self, step: int) -> dict[str, float]:
        return {name: value for item in self._of(MODULES, step) for name, value in item.items() if name != "step"}

    def _of(self, kind: str, step: int) -> list[dict]:
        covering = tuple(path for path in self._files[kind] if _covers(path.name, step))
        given_up = tuple(record["time"] for record in self._rollbacks if record["to"] < step) if covering else ()
        key = (kind, covering, given_up[-1:])
        if key not in self._chosen:
            self._chosen[key] = self._newest(covering, given_up[-1] if given_up else "")
        path = self._chosen[key]
        if path is None:
            return []
        if self._steps[kind][0] != path:
            self._steps[kind] = (path, _by_step(path))
        return self._steps[kind][1].get(step, [])

    def _newest(self, covering: Sequence[Path], after: str) -> Path | None:
        """The file of the latest attempt, and of one attempt the latest."""
        if len(covering) == 1 and not after:
            return covering[0]
        ages = {path: self._age(path) for path in covering}
        fresh = [path for path in covering if ages[path][1] >= after]
        return max(fresh, key=ages.get, default=None)

    def _age(self, path: Path) -> tuple[int, str]:
        import pyarrow.parquet as parquet

        metadata = parquet.read_schema(path).metadata or {}
        attempt, time = (metadata.get(key, b"").decode() for key in (b"attempt", b"time"))
        return self._attempts.get(attempt, -1), time

    @cached_property
    def _records(self) -> list[dict]:
        return journal.read(self._run)

    @cached_property
    def _attempts(self) -> dict[str, int]:
        """Of each attempt the place of its last record."""
        return {str(record.get("attempt")): place for place, record in enumerate(self._records)}

    @cached_property
    def _rollbacks(self) -> list[dict]:
        return [each for each in self._records if each.get("event") == "amended" and each["action"] == "rollback"]


def _write(
    directory: Path, items: Sequence[RowLoss | ModuleNorms], columns: Mapping[str, Sequence], attempt: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kinds = {int: (pa.int64(), "q"), float: (pa.float64(), "d")}
    arrays = []
    for column in columns.values():
        kind, code = kinds[type(column[0])]
        # of its bytes: `pa.array` looks for pandas, and loads it if it is there, which takes a second of the training beside
        arrays.append(pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(array(code, column))]))
    sink = pa.BufferOutputStream()
    table = pa.table(arrays, list(columns), metadata={"attempt": attempt, "time": journal.now()})
    parquet.write_table(table, sink, compression="zstd")
    path = directory / f"step-{items[0].step:08d}-{items[-1].step:08d}.parquet"
    with failures(path, RunError):
        make_directory(path.parent)
        replace_file(path, sink.getvalue())


def _by_step(path: Path) -> dict[int, list[dict]]:
    import pyarrow.parquet as parquet

    found: dict[int, list[dict]] = {}
    for item in parquet.read_table(path).to_pylist():
        found.setdefault(item["step"], []).append(item)
    return found


def _covers(name: str, step: int) -> bool:
    match = _NAME.fullmatch(name)
    return bool(match) and int(match[1]) <= step <= int(match[2])
