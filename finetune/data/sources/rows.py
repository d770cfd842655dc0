"""The rows of one source by position: plain dicts, with the recipe's names for columns, in the shape that a task reads.

A bad row raises a DataError with its place, like `data/train.jsonl:12`.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.data.shapes.choice import FIRST_ROWS, JSON_COLUMNS, Choice, choice_of
from finetune.data.shapes.shape import listed as listed_text
from finetune.data.sources import fingerprints, paths
from finetune.data.sources.arrow import without_nulls
from finetune.data.sources.files import ENDINGS, Reader
from finetune.data.sources.fingerprints import State
from finetune.data.sources.paths import Files
from finetune.errors import DataError
from finetune.recipe.schema import Source
from finetune.store import places


class Rows:
    """The rows of a source, map-style. `fingerprint` covers their content alone, not file names or times."""

    def __init__(
        self, reader: Reader, name: str, fingerprint: str, source: Source, row_rules: int, form: str | None = None
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.state = state_of(name)
        self._reader = reader
        self._source, self._form = source, form
        self._columns, self._skip, self._row_rules = source.columns, frozenset(source.skip), row_rules

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from 0, in the form that a task reads. Columns without a use keep their names."""
        row, chosen = self.as_written(index), self.choice
        # A shape makes columns and fields as well, like calls of ShareGPT's turns: `skip` names these, too.
        return self._without_skipped(chosen.shape.canonical(row, self.where(index))) if chosen else row

    @cached_property
    def choice(self) -> Choice | None:
        """The shape of the rows; None if they stay as they are. DataError if they could have two."""
        if self._form is None or self._row_rules == 1:
            return None
        return choice_of(self._source, self._form, self.first_readable())

    def first_readable(self) -> Iterator[tuple[Row, str]]:
        """The first rows as the source writes them, with their places, without those that cannot be read."""
        for index in range(min(len(self), FIRST_ROWS)):
            with suppress(DataError):  # reading that row raises it again
                yield self.as_written(index), self.where(index)

    def as_written(self, index: int) -> Row:
        """Row `index`, from 0. Columns are renamed to their fields; other columns keep their names."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows of {self.name}")
        row = self._reader[index]
        if self._row_rules > 1:
            kinds = self._reader.kinds
            row = self._without_skipped(row if kinds is None else without_nulls(row, kinds))
        for field, column in self._columns.items():
            if column not in row:
                hint = f"correct `columns.{field}` in the recipe"
                raise DataError(f"no column `{column}`, there is {listed(row)}", where=self.where(index), hint=hint)
        kept = {column: value for column, value in row.items() if column not in self._columns.values()}
        if self._row_rules > 1 and (hidden := kept.keys() & self._columns.keys()):
            field = min(hidden)
            message = f"has a column `{field}` beside `{self._columns[field]}`, which `columns.{field}` takes for it"
            raise DataError(
                message, where=self.where(index), hint=f"name the one to drop: data.train[].skip: [{field}]"
            )
        return kept | {field: row[column] for field, column in self._columns.items()}

    def _without_skipped(self, row: Row) -> Row:
        """The row without the columns and message fields in the recipe's `skip`."""
        if not self._skip:
            return row
        kept = {column: value for column, value in row.items() if column not in self._skip}
        return {
            # fields within JSON text are skipped as those within lists; other columns stay text, whatever they spell
            column: self._fields_left(listed_text(value) if self._form and column in JSON_COLUMNS else value)
            for column, value in kept.items()
        }

    def _fields_left(self, value: object) -> object:
        if not isinstance(value, list):
            return value
        return [
            {field: item[field] for field in item if field not in self._skip} if isinstance(item, dict) else item
            for item in value
        ]

    @property
    def about(self) -> str:
        """What was read and how, for `plan`."""
        return self._reader.about

    def where(self, index: int) -> str:
        """The place of row `index` for messages: the line of a file, or the row, from 0, of a Parquet file or data set."""
        return self._reader.where(index)


def state_of(name: str) -> State | None:
    """Facts that change when a file of a path does. None if there is no file."""
    if not places.is_there(name):
        return None
    return facts_of(paths.files_of(name, ENDINGS))


def facts_of(files: Files) -> State | None:
    if files.is_one:
        return fingerprints.state_of_file(files.names[0])
    return fingerprints.state_of_files(files.names)
