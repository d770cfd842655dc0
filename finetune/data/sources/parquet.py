"""The reader of Parquet files. A damaged file or row group raises DataError."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from finetune.data.example import Row
from finetune.data.refusals import first_line, listed
from finetune.data.sources.arrow import has_json, with_json
from finetune.data.sources.opened import Opened, Reading
from finetune.errors import DataError

FIRST_ROWS = 20_000  # up to here the first rows of a file are read apart from their group


class Parquet:
    """A Parquet file; memory keeps the two row groups read last."""

    about = "Parquet"

    def __init__(self, opened: Opened, most: int | None, reading: Reading):
        import pyarrow
        from pyarrow.parquet import ParquetFile

        name, row_rules = opened.name, reading.row_rules
        self._name = name
        self._damage = (pyarrow.ArrowException, OSError)
        try:
            file = ParquetFile(opened.path, memory_map=True)
        except self._damage as error:
            raise DataError("is not a whole Parquet file", where=name, hint="write or fetch it again") from error
        names = file.schema_arrow.names
        self.kinds = {field.name: field.type for field in file.schema_arrow}
        self._json = [name for name, kind in self.kinds.items() if row_rules > 1 and has_json(kind)]
        if row_rules > 1 and len(set(names)) < len(names):
            raise DataError(f"repeated column name among {listed(names)}", where=name)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._read_group: Callable[[int], pyarrow.Table] = lru_cache(maxsize=2)(file.read_row_group)
        self._count = int(self._starts[-1]) if most is None else min(most, int(self._starts[-1]))
        if most is not None and most <= FIRST_ROWS and sizes and sizes[0] >= most:
            # without the rest of the group
            self._read_group = lru_cache(maxsize=1)(lambda _: next(file.iter_batches(batch_size=most)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            row = self._read_group(group).slice(index - self._starts[group], 1).to_pylist()[0]
            return row | {name: with_json(row[name], self.kinds[name]) for name in self._json}
        except (*self._damage, ValueError) as error:
            raise DataError(f"is damaged: {first_line(error)}", where=self.where(index)) from error

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"
