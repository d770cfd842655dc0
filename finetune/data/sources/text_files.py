"""Readers of text files: JSON Lines and CSV, both in UTF-8. A bad file or row raises DataError."""

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from pydantic_core import from_json

from finetune.data.example import Row
from finetune.data.refusals import listed, together
from finetune.errors import DataError, counted
from finetune.store import strict_json

SCAN_BYTES = 16 * 2**20
SEPARATORS = {";": "`;`", "\t": "tabs", "|": "`|`"}  # other separators found in CSV files
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines:
    """One JSON object a line. The file is mapped and rows are parsed on access. Memory: 8 bytes a line, 16 if some are blank."""

    kinds = None

    def __init__(self, name: str, most: int | None, row_rules: int):
        self._name, self._row_rules = name, row_rules
        self._bytes = np.memmap(name, dtype=np.uint8, mode="r")
        if _is_utf_16(start := self._bytes[:32].tobytes()):
            raise DataError("is not UTF-8 text", where=f"{name}:1", hint=_encoding_hint(start))
        size = len(self._bytes)
        scans = (range(size)[start : start + SCAN_BYTES] for start in range(0, size, SCAN_BYTES))
        newlines, found, scanned = [], 0, 0
        for scan in scans:
            scanned = scan.stop
            newlines.append(scan.start + np.flatnonzero(self._bytes[scan.start : scan.stop] == ord("\n")))
            found += len(newlines[-1])
            if most is not None and found >= most:
                break
        end = [] if self._bytes[-1] == ord("\n") or scanned < size else [size]
        self._edges = np.concatenate([[-1], *newlines, end]).astype(np.int64)  # line k is between edges k and k + 1
        firsts = self._bytes[self._edges[:-1] + 1]
        may_be = np.flatnonzero(np.isin(firsts, list(b" \t\r\n"))).tolist()
        blanks = [line for line in may_be if not self._line(line).strip()]
        self._lines = (np.delete(np.arange(len(firsts)), blanks) if blanks else range(len(firsts)))[:most]

    def _line(self, line: int) -> bytes:
        content = self._bytes[self._edges[line] + 1 : self._edges[line + 1]].tobytes()
        return content.removeprefix(BYTE_ORDER_MARK) if line == 0 else content

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        content = self._line(int(self._lines[index]))
        hint = 'each line holds one JSON object, like `{"text": "..."}`'
        if content.lstrip().startswith(b"["):
            hint += "; `jq -c '.[]'` makes lines of an array"
        try:
            row = from_json(content.decode())
            if self._row_rules > 1:
                strict_json.from_json(content)
        except UnicodeDecodeError as error:
            raise DataError("is not UTF-8 text", where=self.where(index), hint="save the file as UTF-8") from error
        except strict_json.RepeatedKeyError as error:
            message = f"repeats the key `{error.key}`"
            raise DataError(message, where=self.where(index), hint="keep one of the values") from None
        except ValueError as error:
            reason = re.sub(r" at line \d+ column (\d+)$", r" at column \1", str(error))
            raise DataError(f"bad JSON: {reason}", where=self.where(index), hint=hint) from error
        if not isinstance(row, dict):
            raise DataError("is not a JSON object", where=self.where(index), hint=hint)
        return row

    def where(self, index: int) -> str:
        return f"{self._name}:{self._lines[index] + 1}"


def _encoding_hint(start: bytes) -> str:
    return "it seems to be UTF-16: save it as UTF-8" if _is_utf_16(start) else "save the file as UTF-8"


def _is_utf_16(start: bytes) -> bool:
    """Detects UTF-16 by its byte-order mark, or by zero bytes at the start: neither JSON nor CSV has them."""
    signs = start[:32]
    return signs[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in signs and any(signs))


class Csv:
    """Comma-separated values under one line of column names (RFC 4180), in UTF-8. Held in memory; every value is text."""

    kinds = None

    def __init__(self, name: str, most: int | None, row_rules: int):
        self._name = name
        csv.field_size_limit(sys.maxsize)  # the default refuses values over 131,072 characters
        try:
            with open(name, encoding="utf-8-sig", newline="") as file:
                self._rows = list(islice(self._lines(file), None if most is None else most + 1))
        except UnicodeDecodeError as error:
            raise _not_utf_8(name) from error
        self._columns = self._rows.pop(0)[1] if self._rows else []
        self._check(row_rules)

    def _lines(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        """The first line and the values of each row, the header included."""
        lines, start, columns = csv.reader(file, strict=True), 1, None
        try:
            for values in lines:
                if values:
                    columns = columns or values
                    yield start, values
                start = lines.line_num + 1
        except csv.Error as error:
            if columns is None:  # quoted names with another separator between them
                file.seek(0)
                columns = [file.readline()]
            hint = _separator_hint(columns) or "a quote inside a quoted value is written twice"
            raise DataError(f"bad CSV: {error}", where=f"{self._name}:{start}", hint=hint) from error

    def _check(self, row_rules: int) -> None:
        if row_rules > 1 and (hint := _separator_hint(self._columns)):
            message = f"has one column, {listed(self._columns)}"
            raise DataError(message, where=f"{self._name}:1", hint=hint)
        if len(set(self._columns)) < len(self._columns):
            raise DataError(f"repeated column name among {listed(self._columns)}", where=f"{self._name}:1")
        hint = "put a value that holds a comma in double quotes"
        refused = [
            DataError(
                f"has {counted(len(values), 'value')}, the header {counted(len(self._columns), 'name')}",
                where=f"{self._name}:{line}",
                hint=hint,
            )
            for line, values in self._rows
            if len(values) != len(self._columns)
        ]
        if refused:
            raise together(refused)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return dict(zip(self._columns, self._rows[index][1], strict=True))

    def where(self, index: int) -> str:
        return f"{self._name}:{self._rows[index][0]}"


def _not_utf_8(name: str) -> DataError:
    content = Path(name).read_bytes()
    try:
        content.decode()
        line = 1
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    return DataError("is not UTF-8 text", where=f"{name}:{line}", hint=_encoding_hint(content))


def _separator_hint(columns: Sequence[str] | None) -> str | None:
    """A hint for a header that another separator would split."""
    if columns is None or len(columns) != 1:
        return None
    counts = {name: columns[0].count(sign) for sign, name in SEPARATORS.items()}
    most = max(counts, key=counts.__getitem__)
    return f"its values seem to be separated by {most}: write it with commas" if counts[most] else None
