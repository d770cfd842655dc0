"""Readers of local files: JSON Lines, CSV and Parquet. You get each row by position, and its place for messages.

A bad file or row raises DataError.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from finetune.data.example import Row
from finetune.data.sources.arrow import Kinds
from finetune.data.sources.parquet import Parquet
from finetune.data.sources.text_files import Csv, JsonLines
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES


class Reader(Protocol):
    """Rows of one file, under the file's own column names."""

    @property
    def kinds(self) -> Kinds | None:
        """Arrow's types; None for other files. With Arrow a null may mean an absent field: all objects of a column have the same fields."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def where(self, index: int) -> str: ...


def reader_of(name: str, most: int | None = None, row_rules: int = ROW_RULES) -> Reader:
    """The reader for the ending of this file; of its first `most` rows, or of all."""
    try:
        return _opened(Path(name), most, row_rules)
    except PermissionError as error:
        hint = f"let user {os.geteuid()} read it, or train as another one"
        raise DataError("cannot be read: permission denied", where=name, hint=hint) from error


def _opened(file: Path, most: int | None, row_rules: int) -> Reader:
    name = str(file)
    if not file.exists():
        raise DataError("no such file", where=name, hint="a path is seen from the working directory")
    if not file.is_file():
        raise DataError("is not a file", where=name, hint="list the files one by one in the recipe")
    if file.suffix.lower() not in READERS:
        ending = f"unknown ending `{file.suffix}`" if file.suffix else "has no ending"
        raise DataError(ending, where=name, hint="rows are read from .jsonl, .parquet and .csv")
    if file.stat().st_size == 0:
        raise DataError("is empty", where=name, hint="training needs at least one row")
    return READERS[file.suffix.lower()](name, most, row_rules)


READERS: dict[str, Callable[[str, int | None, int], Reader]] = {
    ".jsonl": JsonLines,
    ".json": JsonLines,
    ".parquet": Parquet,
    ".csv": Csv,
}
