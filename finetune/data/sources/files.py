"""Readers of one local file. You get each row by position, and its place for messages.

A bad file or row raises DataError.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.data.example import Row
from finetune.data.sources import json_documents
from finetune.data.sources.arrow import Kinds
from finetune.data.sources.arrow_files import Arrow
from finetune.data.sources.json_lines import JsonLines
from finetune.data.sources.opened import Opened, Reading
from finetune.data.sources.parquet import Parquet
from finetune.data.sources.plain_files import PlainText
from finetune.data.sources.tables import Table
from finetune.data.sources.unpacked import PACKERS, unpacked
from finetune.errors import DataError
from finetune.recipe.schema.source_rules import TEXT_ENDINGS, ending_of


class Reader(Protocol):
    """Rows of one file, under the file's own column names."""

    @property
    def kinds(self) -> Kinds | None:
        """Arrow's types; None for other files. With Arrow a null may mean an absent field: all objects of a column have the same fields."""

    @property
    def about(self) -> str:
        """The format as it was found, for `plan`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def where(self, index: int) -> str: ...


@dataclass(frozen=True)
class Kind:
    """A format of files."""

    name: str
    endings: tuple[str, ...]
    open: Callable[[Opened, int | None, Reading], Reader]
    is_packed: bool = True
    """Whether its files may be packed as a whole."""


KINDS = (
    Kind("JSON", (".jsonl", ".json", ".ndjson"), json_documents.json_file),
    Kind("CSV", (".csv", ".tsv"), Table),
    Kind("Parquet", (".parquet",), Parquet, is_packed=False),
    Kind("Arrow", (".arrow", ".feather"), Arrow, is_packed=False),
    Kind("text", TEXT_ENDINGS, PlainText),
)
READERS = {ending: kind.open for kind in KINDS for ending in kind.endings} | {".jsonl": JsonLines, ".ndjson": JsonLines}
ENDINGS = {ending: kind.name for kind in KINDS for ending in kind.endings}
KNOWN_FIRST = (".jsonl", ".parquet", ".csv")
"""Their bytes are read in one way, so that a fingerprint needs no kind. (Those of a `.json` file may be lines as well.)"""


def kind_of(name: str) -> str:
    """What tells how the bytes of a file are read, where its fingerprint has to; else an empty text."""
    ending, packer = ending_of(name), Path(name).suffix.lower()
    if packer in PACKERS:
        return f"{ENDINGS.get(ending)}{'' if ending not in ('.tsv', '.json') else ending}{packer}"
    if ending == ".json":
        return "JSON document" if json_documents.is_document(Opened(name, name)) else ""
    return "" if ending in KNOWN_FIRST else ".tsv" if ending == ".tsv" else ENDINGS.get(ending, "")


class EmptyFileError(DataError):
    """A file without a byte."""


def reader_of(path: str, most: int | None = None, reading: Reading | None = None, name: str | None = None) -> Reader:
    """The reader for the ending of this file; of its first `most` rows, or of all. Messages call it `name`."""
    name = name or path
    try:
        return _opened(Path(path), name, most, reading or Reading())
    except PermissionError as error:
        hint = f"let user {os.geteuid()} read it, or train as another one"
        raise DataError("cannot be read: permission denied", where=name, hint=hint) from error


def _opened(file: Path, name: str, most: int | None, reading: Reading) -> Reader:
    if not file.exists():
        raise DataError("no such file", where=name, hint="a path is seen from the working directory")
    if not file.is_file():
        raise DataError("is not a file", where=name, hint="name a file, a folder or a glob")
    kind = _kind(file, name)
    if reading.row is not None and kind.name != "text":
        raise DataError(f"is a {kind.name} file, which has rows of its own", where=name, hint="remove `row`")
    opened = unpacked(str(file), name) if file.stat().st_size else None
    if opened is None or opened.size == 0:
        raise EmptyFileError("is empty", where=name, hint="give it at least one row")
    return READERS[ending_of(str(file))](opened, most, reading)


def _kind(file: Path, name: str) -> Kind:
    """The kind of a file, by its ending."""
    ending = ending_of(str(file))
    if ending not in READERS:
        said = f"unknown ending `{file.suffix}`" if file.suffix else "has no ending"
        raise DataError(said, where=name, hint=f"rows are read from {', '.join(ENDINGS)}")
    kind = next(kind for kind in KINDS if ending in kind.endings)
    if file.suffix.lower() in PACKERS and not kind.is_packed:
        hint = f"unpack it: {kind.name} files are packed inside"
        raise DataError(f"is a {kind.name} file in a `{file.suffix}` file", where=name, hint=hint)
    return kind
