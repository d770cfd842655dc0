"""The reader of CSV and TSV files, in UTF-8. A bad file or row raises DataError. Every value is text."""

import csv
import io
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from finetune.data.example import Row
from finetune.data.refusals import listed, together
from finetune.data.sources.lines import BYTE_ORDER_MARK, encoding_hint
from finetune.data.sources.opened import Opened, Reading
from finetune.data.sources.separated import START_BYTES, Dialect, dialect_of, usual_of
from finetune.errors import DataError, counted

PIECE_BYTES = 1 << 20
SEPARATORS = {";": "`;`", "\t": "tabs", "|": "`|`"}  # other separators found in CSV files


class Table:
    """Separated values under one line of column names (RFC 4180). The file is mapped; memory: 16 bytes a row."""

    kinds = None

    def __init__(self, file: Opened, most: int | None, reading: Reading):
        self._name = file.name
        csv.field_size_limit(sys.maxsize)  # the default refuses values over 131,072 characters
        self._bytes = file.mapped()
        start = self._bytes[:START_BYTES].tobytes()
        is_whole = len(start) == len(self._bytes)
        self._dialect = dialect_of(start, is_whole, file.name) if reading.row_rules > 1 else Dialect()
        usual = usual_of(file.name)
        self.about = f"{'CSV' if usual == ',' else 'TSV'}{self._dialect.about(usual)}{file.packing}"
        self._columns: list[str] = []
        self._starts, self._lines = array("q"), array("q")
        self._scan(most, reading.row_rules)

    def _scan(self, most: int | None, row_rules: int) -> None:
        """Finds where each row begins, and refuses those with other counts of values than the header."""
        refused = []
        for start, line, values in islice(self._records(), None if most is None else most + 1):
            if not self._columns:
                self._columns = values
                self._check_header(row_rules)
                continue
            self._starts.append(start)
            self._lines.append(line)
            if len(values) != len(self._columns):
                message = f"has {counted(len(values), 'value')}, the header {counted(len(self._columns), 'name')}"
                refused.append((line, message))
        if refused:
            hint = "put a value that holds a comma in double quotes"
            if self._dialect.separator != ",":
                hint = f"put a value that holds {SEPARATORS[self._dialect.separator]} in double quotes"
            raise together([DataError(said, where=f"{self._name}:{line}", hint=hint) for line, said in refused])

    def _records(self) -> Iterator[tuple[int, int, list[str]]]:
        """The first byte, the first line and the values of each row, the header included."""
        lines = _Lines(self._bytes, self._name)
        records, start, line = self._dialect.reader(lines), 0, 1
        is_first = True
        try:
            for values in records:
                if values:
                    is_first = False
                    yield start, line, values
                start, line = lines.read_bytes, records.line_num + 1
        except csv.Error as error:
            # quoted names with another separator between them
            columns = [self._bytes[:START_BYTES].tobytes().decode(errors="replace").partition("\n")[0]]
            hint = _separator_hint(columns if is_first else self._columns)
            quotes = "a quote inside a quoted value is written twice"
            raise DataError(f"bad CSV: {error}", where=f"{self._name}:{line}", hint=hint or quotes) from error

    def _check_header(self, row_rules: int) -> None:
        if row_rules > 1 and (hint := _separator_hint(self._columns)):
            message = f"has one column, {listed(self._columns)}"
            raise DataError(message, where=f"{self._name}:1", hint=hint)
        if len(set(self._columns)) < len(self._columns):
            raise DataError(f"repeated column name among {listed(self._columns)}", where=f"{self._name}:1")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self) else len(self._bytes)
        text = self._bytes[start:end].tobytes().decode()
        values = next(self._dialect.reader(io.StringIO(text, newline="")))
        return dict(zip(self._columns, values, strict=True))

    def where(self, index: int) -> str:
        return f"{self._name}:{self._lines[index]}"


class _Lines:
    """The lines of a file for the csv module, which may end in any way; `read_bytes` of it were given."""

    def __init__(self, content: np.ndarray, name: str):
        self.read_bytes = 0
        self._content, self._name, self._line = content, name, 0
        self._each = self._split()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._each)
        self.read_bytes += len(line)
        self._line += 1
        try:
            return (line.removeprefix(BYTE_ORDER_MARK) if self._line == 1 else line).decode()
        except UnicodeDecodeError as error:
            hint = encoding_hint(self._content[:32].tobytes())
            raise DataError("is not UTF-8 text", where=f"{self._name}:{self._line}", hint=hint) from error

    def _split(self) -> Iterator[bytes]:
        rest: list[bytes] = []
        for start in range(0, len(self._content), PIECE_BYTES):
            piece = self._content[start : start + PIECE_BYTES].tobytes()
            has_no_end = b"\n" not in piece and b"\r" not in piece
            if has_no_end and not (rest and rest[-1].endswith(b"\r")):  # an end may be cut in two
                rest.append(piece)
                continue
            *lines, last = b"".join([*rest, piece]).splitlines(keepends=True)
            rest = [last]
            if last.endswith(b"\n"):
                lines, rest = [*lines, last], []
            yield from lines
        if rest:
            yield from b"".join(rest).splitlines(keepends=True)


def _separator_hint(columns: Sequence[str] | None) -> str | None:
    """A hint for a header that another separator would split."""
    if columns is None or len(columns) != 1:
        return None
    counts = {name: columns[0].count(sign) for sign, name in SEPARATORS.items()}
    most = max(counts, key=counts.__getitem__)
    return f"its values seem to be separated by {most}: write it with commas" if counts[most] else None
