"""Reads a journal on, record by record, while its training appends to it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.errors import RunError
from finetune.store.run.journal import record_of
from finetune.store.run.records import Record

_BEFORE = 200  # bytes, which have the time of a record
_READ_BYTES = 1 << 20


class Line(NamedTuple):
    start: int
    """Its place in the file, in bytes."""
    end: int
    record: Record


class JournalTail:
    """A place in a journal. A torn line at its end is not read until it is whole."""

    def __init__(self, path: Path):
        self._path = path
        self._place = 0

    def go_to(self, place: int, before: str) -> bool:
        """Goes to a place if the same bytes are before it as were; a power cut may have taken them."""
        if self.before(place) != before:
            return False
        self._place = place
        return True

    def go_to_start(self) -> int:
        self._place = 0
        return 0

    def before(self, place: int) -> str:
        """What is before a place."""
        if not self._path.exists():
            return ""
        start = max(0, place - _BEFORE)
        with self._path.open("rb") as file:
            return os.pread(file.fileno(), place - start, start).decode(errors="replace")

    def read(self) -> Iterator[Line]:
        """The records that were added."""
        while data := self._whole_lines():
            for line in data.splitlines(keepends=True):
                record = record_of(line)
                if record is None:
                    if self._has_more_than(line):
                        hint = "restore it from a copy"
                        raise RunError(f"is damaged at byte {self._place}", where=str(self._path), hint=hint)
                    return
                start, self._place = self._place, self._place + len(line)
                yield Line(start, self._place, record)

    def _whole_lines(self) -> bytes:
        if not self._path.exists():
            return b""
        with self._path.open("rb") as file:
            size, data = _READ_BYTES, b""
            # A line may be longer than what is read at once.
            while b"\n" not in data and len(data) < os.fstat(file.fileno()).st_size - self._place:
                data = os.pread(file.fileno(), size, self._place)
                size *= 2
        return data[: data.rfind(b"\n") + 1]

    def _has_more_than(self, line: bytes) -> bool:
        return self._path.stat().st_size > self._place + len(line)
