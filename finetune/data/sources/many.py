"""Rows of many files as of one: they count through the files in order. Memory: 16 bytes a file and its name, and the readers used last."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from blake3 import blake3

from finetune.data.example import Row
from finetune.data.refusals import together
from finetune.data.sources.arrow import without_nulls
from finetune.data.sources.files import EmptyFileError, Reader
from finetune.data.sources.fingerprints import state_of_file
from finetune.errors import DataError, counted
from finetune.store import cache

VERSION = 1  # of the counts in the cache
OPEN_READERS = 4
MOST_REFUSED = 1000  # files that an error is made of
COUNTS, ABOUT = "counts.npy", "about.json"
Open = Callable[[str, int | None], Reader]


class Joined:
    """The rows of several files; each is opened when a row of it is wanted. An empty file has no rows."""

    kinds = None  # nulls that stand for absent fields are gone already: files may differ in their columns

    def __init__(
        self, names: Sequence[str], read: Open, key: str | None = None, most: int | None = None, unread: int = 0
    ):
        """`key` names contents and reading: by it the counts of rows are found again. With `most` files are opened up to that row.

        `unread` is the number of files of other kinds in the same place."""
        self._names, self._read = names, read
        self._states = np.fromiter((hash(state_of_file(name)) for name in names), dtype=np.int64, count=len(names))
        self._reader = lru_cache(maxsize=OPEN_READERS)(self._open)
        if key is None or most is not None:
            counts, about = self._counted(most)
        else:
            digest = blake3(f"{VERSION}\n{key}".encode()).hexdigest()[:32]
            made = cache.built("row-counts", digest, self._build)
            counts, about = np.load(made / COUNTS), json.loads((made / ABOUT).read_text())
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._count = int(self._starts[-1]) if most is None else min(most, int(self._starts[-1]))
        self.about = f"{counted(len(names), 'file')}, {' and '.join(about)}" if about else counted(len(names), "file")
        if empty := int((counts == 0).sum()) if most is None else 0:
            self.about += f", {empty:,} of them without rows"
        self.about += f", {unread:,} of other kinds not read" if unread else ""

    def _build(self, directory: Path) -> None:
        counts, about = self._counted(None)
        np.save(directory / COUNTS, counts)
        (directory / ABOUT).write_text(json.dumps(about))

    def _counted(self, most: int | None) -> tuple[np.ndarray, list[str]]:
        """The rows of each file, and what the files are; all that cannot be read are refused together."""
        counts: list[int] = []
        about: dict[str, None] = {}
        refused: list[DataError] = []
        found = 0
        for number in range(len(self._names)):
            if most is not None and found >= most:
                break
            try:
                reader = self._open(number, None if most is None else most - found)
                counts.append(len(reader))
                about[reader.about] = None
            except EmptyFileError:
                counts.append(0)
            except DataError as error:
                refused += error.parts or [error]
                if len(refused) >= MOST_REFUSED:
                    break
            found = sum(counts[-1:], found)
        if refused:
            raise together(refused)
        return np.array(counts, dtype=np.int64), list(about)

    def _open(self, number: int, most: int | None = None) -> Reader:
        name = self._names[number]
        reader = self._read(name, most)
        if hash(state_of_file(name)) != self._states[number]:
            raise DataError("was changed while it was encoded", where=name, hint="run again when nothing writes to it")
        return reader

    def _of(self, index: int) -> tuple[Reader, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._reader(number), index - int(self._starts[number])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        reader, row = self._of(index)
        found = reader[row]
        return found if reader.kinds is None else without_nulls(found, reader.kinds)

    def where(self, index: int) -> str:
        reader, row = self._of(index)
        return reader.where(row)
