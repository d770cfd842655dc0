"""The reader of text and Markdown files, in UTF-8: a row is a file, a paragraph or a line, in the column `text`."""

import numpy as np

from finetune.data.example import Row
from finetune.data.sources.lines import BYTE_ORDER_MARK, Lines, refuse_utf_16
from finetune.data.sources.opened import Opened, Reading
from finetune.errors import DataError

MOST_BYTES = 1 << 28  # of a file that is one row


class PlainText:
    """Rows of one file. Ends of lines become `\\n`; a file, paragraph or line of blanks alone is no row."""

    kinds = None

    def __init__(self, file: Opened, most: int | None, reading: Reading):
        self._file, self._name, self._row = file, file.name, reading.row or "file"
        self.about = f"text{file.packing}, a row a {self._row}"
        self._lines = None if self._row == "file" else Lines(file, None if self._row == "paragraph" else most)
        self._firsts, self._lasts = self._whole() if self._lines is None else self._parts(self._lines.numbers)
        self._firsts, self._lasts = self._firsts[:most], self._lasts[:most]

    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        size = self._file.size
        if size > MOST_BYTES:
            message = f"is one row of {size >> 20:,} MiB, the most is {MOST_BYTES >> 20:,}"
            raise DataError(
                message, where=self._name, hint="make several rows of it with `row: paragraph` or `row: line`"
            )
        content = self._file.mapped().tobytes()
        refuse_utf_16(content[:32], self._name)
        is_blank = not content.removeprefix(BYTE_ORDER_MARK).strip()
        rows = np.zeros(0 if is_blank else 1, dtype=np.int64)
        return rows, rows

    def _parts(self, numbers: np.ndarray | range) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last line of each row."""
        lines = np.asarray(numbers, dtype=np.int64)
        if self._row == "line" or not len(lines):
            return lines, lines
        edges = np.flatnonzero(np.diff(lines) > 1)
        return lines[np.concatenate([[0], edges + 1])], lines[np.concatenate([edges, [len(lines) - 1]])]

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> Row:
        first, last = int(self._firsts[index]), int(self._lasts[index])
        if self._lines is None:
            content = self._file.mapped().tobytes().removeprefix(BYTE_ORDER_MARK)
        else:
            content = self._lines.content(first, last)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = first + content.count(b"\n", 0, error.start) + 1
            raise DataError("is not UTF-8 text", where=f"{self._name}:{line}", hint="save the file as UTF-8") from error
        if self._lines is not None:
            text = text.removesuffix("\r")  # of the last line's end; `\n` is no part of it
        return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}

    def where(self, index: int) -> str:
        return self._name if self._lines is None else f"{self._name}:{self._firsts[index] + 1}"
