"""Which shape the rows of a source have: the one its recipe names, or the one that its first row shows."""

from collections.abc import Iterable
from typing import NamedTuple

from finetune.data.example import Row
from finetune.data.shapes import SHAPES, messages, patterns, sharegpt
from finetune.data.shapes.shape import Shape
from finetune.errors import DataError
from finetune.recipe.schema import Source

OLDEST = ("messages", "text")
JSON_COLUMNS = (messages.COLUMN, *sharegpt.COLUMNS)
"""Columns with messages, which may be JSON text."""
FIRST_ROWS = 64
"""Of these the first that has a shape decides: a row that cannot be read shows none."""


VERSION = 1
"""Of the rows that shapes make, in the key of encoded rows."""


class Choice(NamedTuple):
    name: str
    """As `plan` says it: the name of the shape, or the patterns."""
    shape: Shape

    @property
    def key(self) -> tuple[str, ...]:
        """For the key of encoded rows. Of shapes that rows always had it is empty: older entries stay good."""
        return () if self.name in OLDEST else (f"{self.name} {VERSION}",)


def patterns_of(source: Source) -> dict[str, str]:
    """The patterns of a source by the column that each makes."""
    given = {"prompt": source.prompt, "completion": source.completion, "text": source.text}
    return {column: pattern for column, pattern in given.items() if pattern is not None}


def choice_of(source: Source, form: str, rows: Iterable[tuple[Row, str]]) -> Choice:
    """The shape of a source. `rows` are its first readable rows, with their places. DataError if a row has two shapes."""
    if made := patterns_of(source):
        names = " and ".join(f"`{column}`" for column in made)
        return Choice(f"pattern{'s' * (len(made) > 1)} {names}", patterns.shape_of(made, form))
    if source.format != "auto":
        return Choice(source.format, SHAPES[source.format])
    known = {name: shape for name, shape in SHAPES.items() if shape.form == form}
    first = near = next(iter(known))
    for row, where in rows:
        found = [name for name, shape in known.items() if shape.fits(row)]
        if first in found or len(found) == 1:
            name = first if first in found else found[0]
            return Choice(name, known[name])
        if found:
            message = f"has the shape of {' and of '.join(f'`{name}`' for name in found)}"
            raise DataError(message, where=where, hint=f"say which: data.train[].format: {found[0]}")
        near = next((name for name, shape in known.items() if shape.is_near(row)), near)
    return Choice(near, known[near])
