"""Floor 0. What a run records of each step beside its journal's line, in columns: the loss of every row, and the gradient norm of every
group of modules.

`saver` writes a file of each kind before a commit, so no checkpoint is ahead of its record; `replay`, `bisect` and `show` read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """The row losses of a step, from the last written file that covers it; empty where none does."""
    return [RowLoss(**item) for item in _read(run / ROWS, step)]


def read_modules(run: Path, step: int) -> dict[str, float]:
    """The gradient norms of a step's modules; empty where no file covers it."""
    return {name: value for item in _read(run / MODULES, step) for name, value in item.items() if name != "step"}


def _write(
    directory: Path, items: Sequence[RowLoss | ModuleNorms], columns: Mapping[str, Sequence], attempt: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kinds = {int: pa.int64(), float: pa.float64()}
    arrays = [pa.array(column, kinds[type(column[0])]) for column in columns.values()]
    sink = pa.BufferOutputStream()
    table = pa.table(arrays, list(columns), metadata={"attempt": attempt, "time": journal.now()})
    parquet.write_table(table, sink, compression="zstd")
    path = directory / f"step-{items[0].step:08d}-{items[-1].step:08d}.parquet"
    with failures(path, RunError):
        make_directory(path.parent)
        replace_file(path, sink.getvalue())


def _read(directory: Path, step: int) -> list[dict]:
    import pyarrow.parquet as parquet

    covering = [path for path in directory.glob("*.parquet") if _covers(path.name, step)]
    if not covering:
        return []
    if (
        len(covering) > 1
    ):  # after a fall-back they agree, or the run has said that exactness is lost; after a rollback the last counts
        attempts = [str(record.get("attempt")).encode() for record in journal.read(directory.parent)]
        order = {attempt: place for place, attempt in enumerate(attempts)}

        def age(path: Path) -> tuple[int, bytes]:
            metadata = parquet.read_schema(path).metadata or {}
            return order.get(metadata.get(b"attempt"), -1), metadata.get(b"time", b"")

        covering.sort(key=age)
    return parquet.read_table(covering[-1], filters=[("step", "=", step)]).to_pylist()


def _covers(name: str, step: int) -> bool:
    match = _NAME.fullmatch(name)
    return bool(match) and int(match[1]) <= step <= int(match[2])
