"""The columns a run records for each step, beside its line in the journal: the loss of every row, the gradient norm of every group of
modules, and the load of every expert.

They are written before a commit, so no checkpoint is ahead of its record.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.store.evaluations import Evaluation
from finetune.store.run import journal, parts, scan
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import EventRecord

if TYPE_CHECKING:
    import pyarrow as pa


class RowLoss(NamedTuple):
    """The loss of one example in a step; `row` is the id of its row."""

    step: int
    example: int
    row: int
    loss: float
    tokens: int


class ModuleNorms(NamedTuple):
    """The 2-norm of the gradient of each group of modules in a step, before clipping."""

    step: int
    norms: Mapping[str, float]


class ExpertLoad(NamedTuple):
    """How many tokens of a step a router sent to each of its experts."""

    step: int
    layer: str
    tokens: list[int]


@dataclass(frozen=True)
class Columns:
    """The records of some steps, oldest first."""

    rows: list[RowLoss] = field(default_factory=list)
    modules: list[ModuleNorms] = field(default_factory=list)
    experts: list[ExpertLoad] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    """`write` has no part in them: what stands for their weights is known with the files of a save."""

    def extend(self, later: "Columns") -> None:
        """Adds the records of later steps."""
        self.rows.extend(later.rows)
        self.modules.extend(later.modules)
        self.experts.extend(later.experts)
        self.evaluations.extend(later.evaluations)

    def __add__(self, later: "Columns") -> "Columns":
        both = ([*getattr(self, each.name), *getattr(later, each.name)] for each in fields(self))
        return Columns(*both)

    def write(self, run: Path, attempt: str) -> None:
        """Writes to `rows/`, `modules/` and `experts/`, durably."""
        if self.rows:
            rows = dict(zip(RowLoss._fields, zip(*self.rows, strict=True), strict=True))
            parts.write(RunDirectory(run).rows, [item.step for item in self.rows], _table(rows), attempt)
        if self.modules:
            steps = [item.step for item in self.modules]
            norms = {name: [item.norms[name] for item in self.modules] for name in self.modules[0].norms}
            parts.write(RunDirectory(run).modules, steps, _table({"step": steps, **norms}), attempt)
        if self.experts:
            steps = [item.step for item in self.experts]
            parts.write(RunDirectory(run).experts, steps, _loads(self.experts), attempt)


def read_rows(run: Path, step: int) -> list[RowLoss]:
    """The row losses of a step; empty if no file covers it."""
    return Reader(run).rows(step)


class Reader:
    """The columns of a run, for many steps: reads directories and journal once, and keeps rows around the last step in memory.

    If several files cover a step, the last one counts, unless it is older than a rollback over the step.
    """

    def __init__(self, run: Path):
        self._run = run
        paths = RunDirectory(run)
        self._rows, self._modules, self._experts = (
            parts.Reader(each, lambda: self._rollbacks) for each in (paths.rows, paths.modules, paths.experts)
        )

    def rows(self, step: int) -> list[RowLoss]:
        return [
            RowLoss(int(item["step"]), int(item["example"]), int(item["row"]), item["loss"], int(item["tokens"]))
            for item in self._rows.of(step)
        ]

    def modules(self, step: int) -> dict[str, float]:
        found = self._modules.of(step)
        return {name: value for item in found for name, value in item.items() if name != "step"}

    def experts(self, step: int) -> dict[str, list[int]]:
        """Tokens of each expert, by layer; empty for a base without experts."""
        found: list[dict[str, Any]] = self._experts.of(step)
        return {item["layer"]: item["tokens"] for item in found}

    @cached_property
    def _rollbacks(self) -> list[EventRecord]:
        return [event for event in scan.events(self._run) if journal.is_rollback(event)]


def _loads(loads: Sequence[ExpertLoad]) -> "pa.Table":
    import pyarrow as pa

    names = [load.layer.encode() for load in loads]
    offsets = pa.py_buffer(array("i", [0, *accumulate(map(len, names))]))
    layers = pa.StringArray.from_buffers(len(loads), offsets, pa.py_buffer(b"".join(names)))
    ends = array("i", [0, *accumulate(len(load.tokens) for load in loads)])
    tokens = pa.ListArray.from_arrays(
        pa.Array.from_buffers(pa.int32(), len(ends), [None, pa.py_buffer(ends)]),
        _integers([count for load in loads for count in load.tokens]),
    )
    return pa.table([_integers([load.step for load in loads]), layers, tokens], ["step", "layer", "tokens"])


def _integers(values: Sequence[int]) -> "pa.Array":
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(array("q", values))])


def _table(columns: Mapping[str, Sequence[float]]) -> "pa.Table":
    import pyarrow as pa

    kinds = {int: (pa.int64(), "q"), float: (pa.float64(), "d")}
    arrays = []
    for column in columns.values():
        kind, code = kinds[type(column[0])]
        # of its bytes: `pa.array` looks for pandas, and loads it if it is there, which takes a second of the training beside
        arrays.append(pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(array(code, column))]))
    return pa.table(arrays, list(columns))
