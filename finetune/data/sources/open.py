"""Rows of one source by position: of local files, or of a Hub data set at a pinned revision.

A row is a plain dict of columns, renamed by the recipe's `columns`. A bad row raises a DataError with its place, like
`data/train.jsonl:12`.
"""

import json
import os
from functools import lru_cache, partial
from pathlib import Path

from blake3 import blake3

from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.data.sources import fingerprints, paths
from finetune.data.sources.arrow import without_nulls
from finetune.data.sources.files import ENDINGS, Reader, kind_of, reader_of
from finetune.data.sources.fingerprints import State
from finetune.data.sources.hub import SPLIT, HubDataset, pin_dataset
from finetune.data.sources.hub_files import hub_files
from finetune.data.sources.kept import Chosen, kept
from finetune.data.sources.many import Joined
from finetune.data.sources.opened import Reading, reading_of
from finetune.data.sources.paths import Files
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES, PinnedSource
from finetune.recipe.schema import Source
from finetune.store import places


class Rows:
    """The rows of a source, map-style. `fingerprint` covers their content alone, not file names or times."""

    def __init__(self, reader: Reader, name: str, fingerprint: str, source: Source, row_rules: int):
        self.name = name
        self.fingerprint = fingerprint
        self.state = state_of(name)
        self._reader = reader
        self._columns, self._skip, self._row_rules = source.columns, frozenset(source.skip), row_rules

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Row:
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
        return {column: self._fields_left(value) for column, value in kept.items()}

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


def said(rows: Rows) -> str:
    """What `plan` says of a source: the files, their format, and the rows kept."""
    return rows.about


def open_source(source: Source, revision: str | None = None, row_rules: int = ROW_RULES) -> Rows:
    """Opens a recipe's source and reads its first row. `revision` is the pin of a Hub data set; without it, pins the data set."""
    if source.dataset is not None:
        if Path(source.dataset).exists():  # `datasets` would load the local path instead, whatever the pin
            raise DataError("is also the name of a local path", where=source.dataset, hint="train in another directory")
        pin = revision or pin_dataset(source)
        content = _of_dataset(source, pin)
        rows = Rows(_reader(source, pin, content, row_rules), source.dataset, content, source, row_rules)
    else:
        files = paths.files_of(source.place, ENDINGS)
        state = _state(files)
        _refuse_unreadable(files)
        content = _fingerprint(files.names, state)
        rows = Rows(_reader(source, None, content, row_rules, files), source.place, content, source, row_rules)
        _refuse_changed(rows, state)
    if len(rows) == 0:
        kept_none = " that `where` keeps" if source.where else ""
        raise DataError(f"holds no rows{kept_none}", where=rows.name, hint="training needs at least one")
    rows[0]  # refuses a source of the wrong shape before anything heavy happens
    return rows


def _reader(source: Source, revision: str | None, content: str, row_rules: int, files: Files | None = None) -> Reader:
    """The rows that a recipe chooses of a source with this content; `files` are those of its path, if they are known."""
    reading = reading_of(source, row_rules)
    key = f"{content}\n{reading.row}\n{row_rules}"
    if source.dataset is not None:
        revision = revision or ""
        reader: Reader = hub_files(source, revision, reading, key) if source.files else HubDataset(source, revision)
    else:
        files = files or paths.files_of(source.place, ENDINGS)
        reader = _local(files, reading, key, source.take if source.where is None else None)
    return kept(reader, source.where, source.take, key)


def _local(files: Files, reading: Reading, key: str | None, most: int | None) -> Reader:
    """The rows of files, of all or of the first `most`; `key` names contents and reading."""
    if files.is_one:
        return reader_of(files.names[0], most, reading)
    return Joined(files.names, partial(_opened, reading), key, most, len(files.unread))


def _opened(reading: Reading, name: str, most: int | None) -> Reader:
    return reader_of(name, most, reading)


def _of_dataset(source: Source, pin: str) -> str:
    identity = [source.dataset, pin, source.name, source.split or SPLIT, *([source.files] if source.files else [])]
    return f"blake3:{blake3(json.dumps(identity).encode()).hexdigest()}"


def _refuse_unreadable(files: Files) -> None:
    """By their readers, before they are hashed."""
    for name in files.names:
        if not os.path.isfile(name) or not os.access(name, os.R_OK):
            reader_of(name)


def _refuse_changed(rows: Rows, state: State | None) -> None:
    if rows.state != state:
        raise DataError("was changed while it was encoded", where=rows.name, hint="run again when nothing writes to it")


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
        if _has_content(name, pin):
            is_there = name == source.path
            return source if is_there else source.model_copy(update={"path": places.found(source.path, name, "data")})
    if not places.is_there(source.path):
        hint = "name the file where it is now with --data OLD=NEW: equal content is the same data"
        raise DataError("is not here any more", where=source.path, hint=hint)
    return source


def _has_content(name: str, pin: PinnedSource) -> bool:
    try:
        return fingerprint(name) == pin.fingerprint
    except DataError:  # of a folder that has something else
        return False


def fingerprint(name: str) -> str | None:
    """`blake3:…` of the content of a path, read once in a process until a file changes; None if nothing readable is there."""
    if not places.is_there(name):
        return None
    files = paths.files_of(name, ENDINGS)
    if not all(os.path.isfile(each) and os.access(each, os.R_OK) for each in files.names):
        return None
    return _fingerprint(files.names, _state(files))


@lru_cache(maxsize=64)
def _fingerprint(names: tuple[str, ...], as_it_is: State | None) -> str:
    return fingerprints.of_files(names, [kind_of(name) for name in names])


def first_rows(source: Source, count: int) -> Rows:
    """The first rows of a file, without reading the others unless `where` has to."""
    most = count if source.take is None else min(count, source.take)
    files = paths.files_of(source.place, ENDINGS)
    if source.where is None:
        reader = _local(files, reading_of(source), None, most)
    else:
        _refuse_unreadable(files)
        every = _reader(source, None, _fingerprint(files.names, _state(files)), ROW_RULES, files)
        reader = Chosen(every, range(min(len(every), most)), "")
    rows = Rows(reader, source.place, "", source, ROW_RULES)
    if len(rows) == 0:
        kept_none = " that `where` keeps" if source.where else ""
        raise DataError(f"holds no rows{kept_none}", where=rows.name, hint="training needs at least one")
    return rows


def reopen_source(source: Source, pin: PinnedSource, state: State | None, row_rules: int) -> Rows:
    """The same rows in a worker process, with the facts of the first one. Raises DataError if a file is no longer in `state`."""
    reader = _reader(source, pin.revision, pin.fingerprint, row_rules)
    rows = Rows(reader, source.path or pin.name, pin.fingerprint, source, row_rules)
    _refuse_changed(rows, state)
    return rows


def state_of(name: str) -> State | None:
    """Facts that change when a file of a path does. None if there is no file."""
    if not places.is_there(name):
        return None
    return _state(paths.files_of(name, ENDINGS))


def _state(files: Files) -> State | None:
    if files.is_one:
        return fingerprints.state_of_file(files.names[0])
    return fingerprints.state_of_files(files.names)
