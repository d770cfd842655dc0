"""Reads the journal of a run while it grows: each line once, in constant memory.

Nothing here writes.
"""

from collections.abc import Iterator
from pathlib import Path

from finetune.store.run.directory import RunDirectory
from finetune.store.run.journal import broken, record_of
from finetune.store.run.records import Record


class Follower:
    """The records of a run, those of now and later those that were added."""

    def __init__(self, run: Path):
        self._path = RunDirectory(run).journal
        self._place, self._lines, self._file = 0, 0, 0

    @property
    def is_replaced(self) -> bool:
        """Whether another file stands there, or what was read is no longer in it: then read it from the start, by another follower."""
        if not self._place:
            return False
        if not self._path.exists():
            return True
        found = self._path.stat()
        return found.st_ino != self._file or found.st_size < self._place

    def read(self) -> Iterator[Record]:
        """The records since the last call, oldest first.

        A torn end waits for the next call: its writer completes it or cuts it off. A broken line before a sound one is a RunError.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            self._file = self._path.stat().st_ino
            file.seek(self._place)
            torn = 0
            for number, line in enumerate(file, start=self._lines + 1):
                record = record_of(line) if line.endswith(b"\n") else None
                torn += len(line) if record is None else 0
                if record is None:
                    continue
                if torn:
                    raise broken(self._path, self._lines + 1)
                self._place, self._lines = self._place + len(line), number
                yield record
