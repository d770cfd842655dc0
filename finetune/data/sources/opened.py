"""What a reader of one file is given."""

from dataclasses import dataclass
from typing import Literal

from finetune.plan.plan import ROW_RULES
from finetune.recipe.schema import Source

TextRow = Literal["file", "paragraph", "line"]


@dataclass(frozen=True)
class Opened:
    """A file of plain bytes: the one that the recipe names, or what it was unpacked to."""

    name: str
    """What messages call it."""
    path: str


@dataclass(frozen=True)
class Reading:
    """How rows are read: what a recipe says of all files of a source."""

    row_rules: int = ROW_RULES
    row: TextRow | None = None
    """Of text files."""


def reading_of(source: Source, row_rules: int = ROW_RULES) -> Reading:
    return Reading(row_rules, source.row)
