"""The reader of Arrow files, of both formats: that of files (Feather) and that of streams, which `datasets` writes.

A damaged file raises DataError. Memory keeps the two batches read last; batches that are not compressed are only mapped.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from finetune.data.example import Row
from finetune.data.refusals import first_line, listed
from finetune.data.sources import fingerprints
from finetune.data.sources.arrow import has_json, with_json
from finetune.data.sources.opened import Opened, Reading
from finetune.errors import DataError
from finetune.store import cache

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC, OLD_FEATHER = b"ARROW1", b"FEA1"
WRITE_AGAIN = "write or fetch it again"


class Arrow:
    about = "Arrow"

    def __init__(self, file: Opened, most: int | None, reading: Reading):
        import pyarrow as pa

        self._name, self._damage = file.name, (pa.ArrowException, OSError, ValueError)
        try:
            schema, starts, self._batch = _opened(file, most)
        except self._damage as error:
            raise DataError(
                f"is not a whole Arrow file: {first_line(error)}", where=file.name, hint=WRITE_AGAIN
            ) from error
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"repeated column name among {listed(schema.names)}", where=file.name)
        self.kinds = {field.name: field.type for field in schema}
        self._json = [name for name, kind in self.kinds.items() if has_json(kind)]
        self._starts = np.concatenate([[0], np.cumsum(starts, dtype=np.int64)])
        self._count = min(int(self._starts[-1]), int(self._starts[-1]) if most is None else most)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            row = self._batch(number).slice(index - int(self._starts[number]), 1).to_pylist()[0]
            return row | {name: with_json(row[name], self.kinds[name]) for name in self._json}
        except self._damage as error:
            raise DataError(f"is damaged: {first_line(error)}", where=self.where(index)) from error

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"


def _opened(file: Opened, most: int | None) -> "tuple[pa.Schema, list[int], Callable[[int], pa.RecordBatch]]":
    """The schema, the rows of each batch, and a function that reads a batch."""
    import pyarrow as pa

    with open(file.path, "rb") as opened:
        start = opened.read(len(MAGIC))
    if start.startswith(OLD_FEATHER):
        hint = "write it again with `pandas.DataFrame.to_feather` of today"
        raise DataError("is Feather of version 1, which has no types of today", where=file.name, hint=hint)
    if start == MAGIC:
        return _of_file(file.path, most)
    source = pa.memory_map(file.path)
    schema = pa.ipc.read_schema(pa.ipc.read_message(source))
    if any(_has_dictionary(kind) for kind in schema.types):
        key = blake3(f"1\n{fingerprints.of_file(file.path)}".encode()).hexdigest()[:32]
        return _of_file(str(cache.built("arrow-files", key, partial(_write_file, file.path)) / "rows.arrow"), most)
    return _of_stream(source, schema, most)


def _of_file(path: str, most: int | None) -> "tuple[pa.Schema, list[int], Callable[[int], pa.RecordBatch]]":
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(path))
    rows: list[int] = []
    for number in range(reader.num_record_batches):
        if most is not None and sum(rows) >= most:
            break
        rows.append(reader.get_batch(number).num_rows)
    return reader.schema, rows, lru_cache(maxsize=2)(reader.get_batch)


def _of_stream(
    source: "pa.NativeFile", schema: "pa.Schema", most: int | None
) -> "tuple[pa.Schema, list[int], Callable[[int], pa.RecordBatch]]":
    """By the place of each batch's message in the file."""
    import pyarrow as pa

    places: list[int] = []
    rows: list[int] = []
    size = source.size()
    found = 0
    while found < (found + 1 if most is None else most) and (place := source.tell()) < size:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:  # the mark of the end
            break
        places.append(place)
        rows.append(pa.ipc.read_record_batch(message, schema).num_rows)
        found += rows[-1]

    def batch(number: int) -> "pa.RecordBatch":
        source.seek(places[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)

    return schema, rows, lru_cache(maxsize=2)(batch)


def _has_dictionary(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_dictionary(kind) or any(
        _has_dictionary(kind.field(part).type) for part in range(kind.num_fields)
    )


def _write_file(path: str, directory: Path) -> None:
    """A stream with dictionaries as a file: its batches cannot be read alone."""
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
    made = str(directory / "rows.arrow")
    with (
        pa.memory_map(path) as source,
        pa.ipc.open_stream(source) as reader,
        pa.ipc.new_file(made, reader.schema, options=options) as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)
