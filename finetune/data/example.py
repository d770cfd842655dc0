"""An encoded row, and the encoded rows of a source."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from finetune.data import bad_rows

Row = dict[str, object]
"""A row of a source, by the names that a task has for its columns."""


class Rows(Protocol):
    """The rows of a source by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class Example(NamedTuple):
    """One encoded row, or a part of a long one."""

    tokens: np.ndarray
    """Token ids, int32, shape (length,)."""
    supervised: np.ndarray
    """Loss mask: True for tokens with a loss, bool, shape (length,)."""
    cut_tokens: int = 0
    """Tokens of the row beyond `max_length`, dropped."""
    lost_targets: int = 0
    """The supervised ones of these."""
    numbers: tuple[float, ...] = ()
    """What the task's loss needs beside tokens, like a label; every example of a task has as many."""


# rows and their places in, the examples of each row out
Encoder = Callable[[Sequence[Row], Sequence[str]], list[list[Example]]]


class Encoded:
    """Examples of one source, memory-mapped: on the disk 5 bytes a token, 24 an example and 8 a row; in memory only the pages in use.

    Flat over all tokens: `tokens` int32, `supervised` bool. One entry an example: `rows` (int64, the row it came from), `targets`
    (int32, tokens its loss is summed over) and `cut_tokens` (int32); `offsets` (int64) has one entry more. `left_out_rows` (int64)
    have no example. `lost` (int64, two columns) is each row that lost supervised tokens, and how many; older entries have none.
    `numbers` (float64) has a column for each number that an example of the task has, and is not written where it has none.
    `contents` (uint64, an entry a row) is a hash of the row's content. `columns` are those of all rows; None in older entries.
    `bad_rows` were skipped: their content is `BAD`, and `first_bad_rows` says why of the first ones; `bad_rows.read` of all.
    """

    said = ""
    """How the source was read, for `plan`."""

    def __init__(self, directory: Path):
        def mapped(name: str) -> np.ndarray:
            return np.load(directory / f"{name}.npy", mmap_mode="r").view(np.ndarray)  # slices of a memmap are slow

        self.tokens, self.supervised, self.offsets = mapped("tokens"), mapped("supervised"), mapped("offsets")
        self.rows, self.targets, self.cut_tokens = mapped("rows"), mapped("targets"), mapped("cut_tokens")
        self.left_out_rows = mapped("left_out")
        # An older entry of the cache lacks some of these files.
        has_lost = (directory / "lost.npy").exists()
        self.lost = mapped("lost") if has_lost else np.zeros((0, 2), dtype=np.int64)
        self.contents = mapped("contents")
        has_numbers = (directory / "numbers.npy").exists()
        self.numbers = mapped("numbers") if has_numbers else np.zeros((len(self.rows), 0))
        columns = directory / "columns.json"
        self.bad_rows = bad_rows.count(directory)
        self.first_bad_rows = bad_rows.first(directory)
        self.columns: list[str] | None = json.loads(columns.read_text()) if columns.exists() else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        numbers = tuple(self.numbers[index].tolist())
        return Example(self.tokens[start:end], self.supervised[start:end], int(self.cut_tokens[index]), numbers=numbers)
