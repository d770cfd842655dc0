"""The separator and the quotes of a CSV or TSV file, found from its start alone.

What RFC 4180 reads is read so. Another way is taken only where every row of the start has as many values as the header.
"""

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from finetune.data.sources.lines import encoding_hint
from finetune.errors import DataError
from finetune.recipe.schema.source_rules import ending_of

START_BYTES = 1 << 20
MOST_RECORDS = 1000
NAMES = {",": "`,`", ";": "`;`", "\t": "tabs", "|": "`|`"}


class Records(Protocol):
    """What `csv.reader` returns."""

    @property
    def line_num(self) -> int:
        """Lines read so far."""

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


@dataclass(frozen=True)
class Dialect:
    separator: str = ","
    quote: str | None = '"'

    def about(self, usual: str) -> str:
        """What differs from a file with the usual separator and double quotes."""
        said = "" if self.separator == usual else f" separated by {NAMES[self.separator]}"
        return said + (" without quotes" if self.quote is None else "" if self.quote == '"' else f" in `{self.quote}`")

    def reader(self, lines: Iterable[str]) -> Records:
        if self.quote is None:
            return csv.reader(lines, strict=True, delimiter=self.separator, quoting=csv.QUOTE_NONE)
        return csv.reader(lines, strict=True, delimiter=self.separator, quotechar=self.quote)


def dialect_of(start: bytes, is_whole: bool, name: str) -> Dialect:
    """That of a file which begins with these bytes. Raises DataError where several fit."""
    if len(start) > 8 and not (any(start[1:32:2]) and any(start[:32:2])):  # UTF-16 without a mark also reads as UTF-8
        raise DataError("is not UTF-8 text", where=f"{name}:1", hint=encoding_hint(start))
    text = _decoded(start, is_whole, name)
    usual = usual_of(name)
    for quote in ('"', "'"):
        if quote == "'" and not text.startswith("'"):
            continue
        if _columns(text, is_whole, Dialect(usual, quote)) > 1:
            return Dialect(usual, quote)
        others = [sign for sign in NAMES if sign != usual and _columns(text, is_whole, Dialect(sign, quote)) > 1]
        if len(others) > 1:
            found = " or ".join(NAMES[sign] for sign in others)
            hint = f"write it with {'tabs' if usual == chr(9) else 'commas'}"
            raise DataError(f"its values may be separated by {found}", where=f"{name}:1", hint=hint)
        if others:
            return Dialect(others[0], quote)
    if _columns(text, is_whole, Dialect("\t", None)) > 1:
        return Dialect("\t", None)
    return Dialect(_of_header(text, usual))


def usual_of(name: str) -> str:
    """The separator that a file's ending promises."""
    return "\t" if ending_of(name) == ".tsv" else ","


def _of_header(text: str, usual: str) -> str:
    """The one separator of the header, for a file with bad rows: they are then refused with their lines."""
    header, _, _ = text.partition("\n")
    signs = [sign for sign in NAMES if _columns(header, True, Dialect(sign)) > 1]
    return signs[0] if len(signs) == 1 else usual


def _decoded(start: bytes, is_whole: bool, name: str) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start, final=is_whole)
    except UnicodeDecodeError as error:
        line = start.count(b"\n", 0, error.start) + 1
        raise DataError("is not UTF-8 text", where=f"{name}:{line}", hint=encoding_hint(start)) from error
    return text


def _columns(text: str, is_whole: bool, dialect: Dialect) -> int:
    """The number of columns, read in this way; 0 where a row has more or fewer values than the header."""
    header: list[str] = []
    last: list[str] = []
    records = dialect.reader(io.StringIO(text, newline=""))
    try:
        for _ in range(MOST_RECORDS):
            if last and len(last) != len(header):
                return 0
            last = next(records)
            header = header or last
    except StopIteration:
        if is_whole and last and len(last) != len(header):
            return 0
    except csv.Error:
        if is_whole or records.line_num < text.count("\n"):
            return 0
    return len(header)
