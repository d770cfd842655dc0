"""Rows of one source by position: a JSON Lines, Parquet or CSV file, or a Hub data set at a pinned revision.

A row is a plain dict of columns, renamed by the recipe's `columns`. A bad row raises a DataError with its place, like
`data/train.jsonl:12`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path

from blake3 import blake3

from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.data.shapes.choice import FIRST_ROWS, JSON_COLUMNS, Choice, choice_of
from finetune.data.shapes.shape import listed as listed_text
from finetune.data.sources.arrow import without_nulls
from finetune.data.sources.files import Reader, reader_of
from finetune.data.sources.hub import SPLIT, HubDataset, pin_dataset
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES, PinnedSource
from finetune.recipe.schema import Source
from finetune.store import places

State = tuple[int, ...]


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
        return chosen.shape.canonical(row, self.where(index)) if chosen else row

    @cached_property
    def choice(self) -> Choice | None:
        """The shape of the rows; None if they stay as they are. DataError if they could have two."""
        if self._form is None or self._row_rules == 1:
            return None
        return choice_of(self._source, self._form, self.first_readable())

    def first_readable(self) -> Iterator[tuple[Row, str]]:
        """The first rows as the source writes them, with their places, without those that cannot be read."""
        for index in range(min(len(self), FIRST_ROWS)):
            with suppress(DataError):  # whoever reads that row gets the error
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

    def where(self, index: int) -> str:
        """The place of row `index` for messages: the line of a file, or the row, from 0, of a Parquet file or data set."""
        return self._reader.where(index)


def open_source(
    source: Source,
    revision: str | None = None,
    row_rules: int = ROW_RULES,
    form: str | None = None,
    skips_bad: bool = False,
) -> Rows:
    """Opens a recipe's source and reads its first row, unless bad ones are skipped. `revision` is the pin of a Hub data set; without
    it, pins the data set. `form` is that of the task's rows; without it they stay as they are."""
    if source.dataset is not None:
        if Path(source.dataset).exists():  # `datasets` would load the local path instead, whatever the pin
            raise DataError("is also the name of a local path", where=source.dataset, hint="train in another directory")
        pin = revision or pin_dataset(source)
        identity = json.dumps([source.dataset, pin, source.name, source.split or SPLIT]).encode()
        known = f"blake3:{blake3(identity).hexdigest()}"
        rows = Rows(HubDataset(source, pin), source.dataset, known, source, row_rules, form)
    else:
        reader = reader_of(source.place, row_rules=row_rules)
        rows = Rows(reader, source.place, fingerprint(source.place) or "", source, row_rules, form)
    if len(rows) == 0:
        raise DataError("holds no rows", where=rows.name, hint="training needs at least one")
    if not skips_bad:
        rows[0]  # refuses a source of the wrong shape before anything heavy happens
    return rows


def located(source: Source, pin: PinnedSource | None) -> Source:
    """The source under the current name of the pinned content. Raises DataError if that is gone.

    A file that changed in place stays as it is: the comparison with the plan reports it.
    """
    if source.path is None or pin is None:
        return source
    if given := places.data(source.path):
        if fingerprint(given) != pin.fingerprint:
            hint = "name an unchanged copy, or train on the new rows in a branch: `finetune branch RUN@STEP`"
            raise DataError(f"has other content than {source.path} had", where=given, hint=hint)
        return source.model_copy(update={"path": places.found(source.path, given, "data")})
    for name in places.around(source.path):
        if os.path.isfile(name) and fingerprint(name) == pin.fingerprint:
            is_there = name == source.path
            return source if is_there else source.model_copy(update={"path": places.found(source.path, name, "data")})
    if not os.path.exists(source.path):
        hint = "name the file where it is now with --data OLD=NEW: equal content is the same data"
        raise DataError("is not here any more", where=source.path, hint=hint)
    return source


def fingerprint(name: str) -> str | None:
    """`blake3:…` of a file's content, read once in a process until the file changes; None if there is no file."""
    state = state_of(name)
    return _fingerprint(name, state) if state and os.path.isfile(name) and os.access(name, os.R_OK) else None


@lru_cache(maxsize=256)
def _fingerprint(name: str, as_it_is: State) -> str:
    digest = blake3(max_threads=blake3.AUTO)
    if as_it_is[2]:  # an empty file cannot be mapped
        digest.update_mmap(name)
    return f"blake3:{digest.hexdigest()}"


def first_rows(source: Source, count: int, form: str | None = None) -> Rows:
    """The first rows of a file, without reading the others."""
    rows = Rows(reader_of(source.place, count), source.place, "", source, ROW_RULES, form)
    if len(rows) == 0:
        raise DataError("holds no rows", where=rows.name, hint="training needs at least one")
    return rows


def reopen_source(
    source: Source, pin: PinnedSource, state: State | None, row_rules: int, form: str | None = None
) -> Rows:
    """The same rows in a worker process, with the facts of the first one. Raises DataError if the file is no longer in `state`."""
    is_file = source.dataset is None
    reader = reader_of(source.place, row_rules=row_rules) if is_file else HubDataset(source, pin.revision or "")
    rows = Rows(reader, source.path or pin.name, pin.fingerprint, source, row_rules, form)
    if rows.state != state:
        raise DataError("was changed while it was encoded", where=rows.name, hint="run again when nothing writes to it")
    return rows


def state_of(name: str) -> State | None:
    """Facts that change when a file does: device, inode, size and times. None if there is no file."""
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
