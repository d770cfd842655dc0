"""What a reader of one file is given."""

import io
import os
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO, Literal

import numpy as np

from finetune.plan.plan import ROW_RULES
from finetune.recipe.schema import Source
from finetune.recipe.schema.source_rules import PACKED_ENDINGS

TextRow = Literal["file", "paragraph", "line"]


@dataclass(frozen=True)
class Opened:
    """A file of plain bytes: the one that the recipe names, or what it was unpacked to."""

    name: str
    """What messages call it."""
    path: str
    content: bytes | None = None
    """Of a small file that was unpacked in memory."""

    @property
    def packing(self) -> str:
        """How it was packed, for `plan`."""
        ending = PurePath(self.name).suffix.lower()
        return f" in `{ending}`" if ending in PACKED_ENDINGS else ""

    @property
    def size(self) -> int:
        return os.stat(self.path).st_size if self.content is None else len(self.content)

    def open(self) -> BinaryIO:
        return open(self.path, "rb") if self.content is None else io.BytesIO(self.content)

    def mapped(self) -> np.ndarray:
        """All bytes, of which memory holds those in use."""
        if self.content is None:
            return np.memmap(self.path, dtype=np.uint8, mode="r")
        return np.frombuffer(self.content, dtype=np.uint8)


@dataclass(frozen=True)
class Reading:
    """How rows are read: what a recipe says of all files of a source."""

    row_rules: int = ROW_RULES
    row: TextRow | None = None
    """Of text files."""


def reading_of(source: Source, row_rules: int = ROW_RULES) -> Reading:
    return Reading(row_rules, source.row)
