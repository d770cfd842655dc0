"""The results of an evaluation for each row, one Parquet file for each pair of rows and model, so that nothing is computed twice.

A file is named by the digest of its rows, its model and its settings, and never changes. No texts of rows are kept: `contents` finds
them in the data again.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

import blake3
import numpy as np

from finetune.errors import RunError
from finetune.plan.facts import Metrics
from finetune.recipe.schema import HELD_OUT as HELD_OUT
from finetune.store import cache
from finetune.store.durable import failures, make_directory, replace_file
from finetune.store.run.directory import RunDirectory, step_name
from finetune.store.strict_json import from_json, to_json

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
_ABOUT = b"finetune.evaluation"
_FIXED = ("content", "row", "tokens")


class Measure(TypedDict):
    """How the column of a measure becomes one figure, and which way is better."""

    per: Literal["tokens", "rows"]
    """The figure is the column's sum over the sum of `tokens`, or over the number of rows."""
    better: Literal["lower", "higher"]


class About(TypedDict):
    schema: int
    ref: str
    """What was evaluated, as its user named it."""
    model: str
    """What stands for its weights: equal for equal ones."""
    data: str
    """Digest of the rows and of how they were encoded: evaluations with the same one can be compared row by row."""
    set: str
    """The name of the rows."""
    task: str
    settings: dict[str, str]
    """What else decides the figures, like the precision."""
    measures: dict[str, Measure]
    """Each measure that has a column."""
    metrics: Metrics
    """The figures of all rows together, as `evaluate` prints them."""
    created: str
    seconds: float
    run: NotRequired[str]
    """The run's id and the step of its training that evaluated itself."""
    step: NotRequired[int]


@dataclass(frozen=True)
class Evaluation:
    about: About
    contents: np.ndarray
    """64 bits that stand for each row's content, uint64 (N,): they pair the rows of two evaluations, in whatever order."""
    rows: np.ndarray
    """Each row's number, counted through the sources, int64 (N,)."""
    tokens: np.ndarray
    """Supervised tokens of each row, int64 (N,)."""
    columns: Mapping[str, np.ndarray]
    """A measure of each row, float64 (N,); `loss` is the row's sum in nats."""
    answers: list[str] | None = None
    """What the model wrote, where it was asked to."""
    others: Mapping[str, list[str]] = field(default_factory=dict)
    """Columns of the rows that comparisons group by."""

    @property
    def key(self) -> str:
        return key_of(self.about["data"], self.about["model"], self.about["settings"])


def key_of(data: str, model: str, settings: Mapping[str, str]) -> str:
    """The name of the evaluation of these rows by this model."""
    said = json.dumps([data, model, settings], sort_keys=True)
    return blake3.blake3(said.encode()).hexdigest()[:32]


def of_step(run: Path, step: int) -> Path:
    """The folder of the evaluations of a step. They outlive its checkpoint."""
    return RunDirectory(run).evaluations / step_name(step)


def of_model(model: str) -> Path:
    """The folder of the evaluations of a model that belongs to no run."""
    return cache.root() / "evaluations" / blake3.blake3(model.encode()).hexdigest()[:32]


def write(folder: Path, evaluation: Evaluation) -> Path:
    """Writes the evaluation to its place in a folder, durably; the same one again changes nothing for a reader."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = folder / f"{evaluation.key}.parquet"
    table = _table(evaluation).replace_schema_metadata({_ABOUT: to_json(evaluation.about).encode()})
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
    with failures(folder, RunError):
        make_directory(folder)
        replace_file(path, sink.getvalue())
    return path


def find(folder: Path, data: str, model: str, settings: Mapping[str, str]) -> Evaluation | None:
    """The evaluation of these rows by this model, if it was made."""
    path = folder / f"{key_of(data, model, settings)}.parquet"
    return read(path) if path.exists() else None


def read_all(folder: Path) -> list[Evaluation]:
    """All evaluations in a folder, oldest first."""
    found = [each for each in map(read, sorted(folder.glob("*.parquet"))) if each]
    return sorted(found, key=lambda each: each.about["created"])


def read_abouts(folder: Path) -> list[About]:
    """What all evaluations in a folder are about, without the results of rows; damaged files are skipped."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    found: list[About] = []
    for path in sorted(folder.glob("*.parquet")):
        with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            found.append(cast(About, from_json((parquet.read_schema(path).metadata or {})[_ABOUT])))
    return found


def read(path: Path) -> Evaluation | None:
    """The evaluation in a file; None if it is damaged or of a newer version: then it is made again."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        # `parquet.read_table` loads pandas
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        about = cast(About, from_json((table.schema.metadata or {})[_ABOUT]))
        if about["schema"] > SCHEMA:
            return None
        names = about["measures"]
        texts = [name for name in table.column_names if name not in (*_FIXED, *names)]
        others = {name: table.column(name).to_pylist() for name in texts}
        return Evaluation(
            about,
            _numbers(table, "content", np.uint64),
            _numbers(table, "row", np.int64),
            _numbers(table, "tokens", np.int64),
            {name: _numbers(table, name, np.float64) for name in names},
            others.pop("answer", None),
            others,
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _numbers(table: "pa.Table", name: str, dtype: type[np.generic]) -> np.ndarray:
    """A column by its bytes: `to_numpy` loads pandas if it is there, which takes a second."""
    column = table.column(name).combine_chunks()
    if column.null_count or column.type.to_pandas_dtype() is not dtype:
        raise ValueError(f"the column {name} is damaged")
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * np.dtype(dtype).itemsize)


def _table(evaluation: Evaluation) -> "pa.Table":
    import pyarrow as pa

    numbers = {
        "content": (pa.uint64(), evaluation.contents),
        "row": (pa.int64(), evaluation.rows),
        "tokens": (pa.int64(), evaluation.tokens),
        **{name: (pa.float64(), column) for name, column in evaluation.columns.items()},
    }
    # of its bytes: `pa.array` looks for pandas, and loads it if it is there
    arrays = {
        name: pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])
        for name, (kind, column) in numbers.items()
    }
    texts = {**evaluation.others, **({"answer": evaluation.answers} if evaluation.answers is not None else {})}
    arrays |= {name: pa.array(values, pa.string(), from_pandas=False) for name, values in texts.items()}
    return pa.table(list(arrays.values()), list(arrays))
