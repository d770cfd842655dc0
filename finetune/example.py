"""Floor 0. The nouns between `tasks`, which make examples of rows, and `data`, which stores, arranges and batches them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One encoded row, or a stretch of one."""

    tokens: np.ndarray
    """Token ids, int32, shape (length,)."""
    supervised: np.ndarray
    """Which tokens the loss is on, bool, shape (length,)."""
    cut_tokens: int = 0
    """Tokens of the row that did not fit into `max_length` and were dropped."""


class Encoded:
    """Examples of one source, memory-mapped.

    Flat over all tokens: `tokens` int32, `supervised` bool. One entry an example (int64): `rows` (the row it came from),
    `targets` (tokens its loss is summed over) and `cut_tokens`; `offsets` has one entry more.
    """

    def __init__(self, directory: Path):
        self.tokens, self.supervised, self.offsets, self.rows, self.targets, self.cut_tokens = (
            np.load(directory / f"{name}.npy", mmap_mode="r")
            for name in ("tokens", "supervised", "offsets", "rows", "targets", "cut_tokens")
        )
        self.left_out_rows = json.loads((directory / "left_out.json").read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Example(self.tokens[start:end], self.supervised[start:end], int(self.cut_tokens[index]))
