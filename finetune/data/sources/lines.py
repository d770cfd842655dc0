"""The lines of a mapped file by their numbers. Memory: 8 bytes a line, 16 if some are blank."""

import numpy as np

from finetune.data.sources.opened import Opened
from finetune.errors import DataError

SCAN_BYTES = 16 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """The lines of a file that are not blank; of its first `most`, or of all. DataError if it is no UTF-8 text by its start."""

    def __init__(self, file: Opened, most: int | None):
        self._bytes = file.mapped()
        refuse_utf_16(self._bytes[:32].tobytes(), file.name)
        self._edges = self._found_edges(most)  # line k is between edges k and k + 1
        firsts = self._bytes[self._edges[:-1] + 1]
        may_be = np.flatnonzero(np.isin(firsts, list(b" \t\r\n"))).tolist()
        blanks = [line for line in may_be if not self.content(line).strip()]
        self.numbers = (np.delete(np.arange(len(firsts)), blanks) if blanks else range(len(firsts)))[:most]
        """Of the lines that are not blank, from 0."""

    def _found_edges(self, most: int | None) -> np.ndarray:
        size = len(self._bytes)
        newlines, found, scanned = [], 0, 0
        for start in range(0, size, SCAN_BYTES):
            scanned = min(start + SCAN_BYTES, size)
            newlines.append(start + np.flatnonzero(self._bytes[start:scanned] == ord("\n")))
            found += len(newlines[-1])
            if most is not None and found >= most:
                break
        end = [] if self._bytes[-1] == ord("\n") or scanned < size else [size]
        return np.concatenate([[-1], *newlines, end]).astype(np.int64)

    def content(self, line: int, last: int | None = None) -> bytes:
        """A line without its end; with `last` all from the one to the other."""
        content = self._bytes[self._edges[line] + 1 : self._edges[(line if last is None else last) + 1]].tobytes()
        return content.removeprefix(BYTE_ORDER_MARK) if line == 0 else content


def refuse_utf_16(start: bytes, name: str) -> None:
    if is_utf_16(start):
        raise DataError("is not UTF-8 text", where=f"{name}:1", hint=encoding_hint(start))


def encoding_hint(start: bytes) -> str:
    return "it seems to be UTF-16: save it as UTF-8" if is_utf_16(start) else "save the file as UTF-8"


def is_utf_16(start: bytes) -> bool:
    """Detects UTF-16 by its byte-order mark, or by zero bytes at the start: neither JSON nor CSV has them."""
    signs = start[:32]
    return signs[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in signs and any(signs))
