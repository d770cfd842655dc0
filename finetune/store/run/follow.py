"""Reads the journal of a run while it grows: each line once, in constant memory.

Nothing here writes.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.store.run.directory import RunDirectory
from finetune.store.run.journal import broken, record_of
from finetune.store.run.records import Record

_BEFORE = 200  # bytes, which have the time of a record


class Line(NamedTuple):
    start: int
    """Its place in the file, in bytes."""
    end: int
    record: Record


class Follower:
    """The records of a run, those of now and later those that were added."""

    def __init__(self, run: Path):
        self._path = RunDirectory(run).journal
        self._place, self._file = 0, 0

    @property
    def is_replaced(self) -> bool:
        """Whether another file stands there, or what was read is no longer in it: then read it from the start, by another follower."""
        if not self._place:
            return False
        if not self._path.exists():
            return True
        found = self._path.stat()
        return found.st_ino != self._file or found.st_size < self._place

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
        """The records since the last one that was taken, oldest first.

        A torn end waits for the next call: its writer completes it or cuts it off. A broken line before a sound one is a RunError.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            self._file = self._path.stat().st_ino
            file.seek(self._place)
            torn = 0
            for line in file:
                record = record_of(line) if line.endswith(b"\n") else None
                torn += len(line) if record is None else 0
                if record is None:
                    continue
                if torn:
                    raise broken(self._path, self._lines() + 1)
                start, self._place = self._place, self._place + len(line)
                yield Line(start, self._place, record)

    def _lines(self) -> int:
        """How many lines are before the place."""
        with self._path.open("rb") as file:
            return sum(1 for line in iter(file.readline, b"") if file.tell() <= self._place)
