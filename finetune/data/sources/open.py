"""Opens the rows of a source: of local files, or of a Hub data set at a pinned revision."""

import json
import os
from functools import lru_cache, partial
from pathlib import Path

from blake3 import blake3

from finetune.data.sources import fingerprints, paths
from finetune.data.sources.files import ENDINGS, Reader, kind_of, reader_of
from finetune.data.sources.fingerprints import State
from finetune.data.sources.hub import SPLIT, HubDataset, pin_dataset
from finetune.data.sources.hub_files import hub_files
from finetune.data.sources.kept import Chosen, kept
from finetune.data.sources.many import Joined
from finetune.data.sources.opened import Reading, reading_of
from finetune.data.sources.paths import Files
from finetune.data.sources.rows import Rows, facts_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES, PinnedSource
from finetune.recipe.schema import Source
from finetune.store import places


def open_source(
    source: Source,
    revision: str | None = None,
    row_rules: int = ROW_RULES,
    form: str | None = None,
    skips_bad: bool = False,
    is_first_read: bool = True,
) -> Rows:
    """Opens a recipe's source and reads its first row, unless bad ones are skipped. `revision` is the pin of a Hub data set; without
    it, pins the data set. `form` is that of the task's rows; without it they stay as they are."""
    if source.dataset is not None:
        if Path(source.dataset).exists():  # `datasets` would load the local path instead, whatever the pin
            raise DataError("is also the name of a local path", where=source.dataset, hint="train in another directory")
        pin = revision or pin_dataset(source)
        content = _of_dataset(source, pin)
        rows = Rows(_reader(source, pin, content, row_rules), source.dataset, content, source, row_rules, form)
    else:
        files = paths.files_of(source.place, ENDINGS)
        state = facts_of(files)
        _refuse_unreadable(files)
        content = _fingerprint(files.names, state)
        rows = Rows(_reader(source, None, content, row_rules, files), source.place, content, source, row_rules, form)
        _refuse_changed(rows, state)
    if len(rows) == 0:
        kept_none = " that `where` keeps" if source.where else ""
        raise DataError(f"holds no rows{kept_none}", where=rows.name, hint="give it at least one row")
    if not is_first_read:
        return rows
    chosen = rows.choice  # refuses rows that could have two shapes
    if not (chosen and skips_bad):
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
    return _fingerprint(files.names, facts_of(files))


@lru_cache(maxsize=64)
def _fingerprint(names: tuple[str, ...], as_it_is: State | None) -> str:
    return fingerprints.of_files(names, [kind_of(name) for name in names])


def first_rows(source: Source, count: int, form: str | None = None) -> Rows:
    """The first rows of a file, without reading the others unless `where` has to."""
    most = count if source.take is None else min(count, source.take)
    files = paths.files_of(source.place, ENDINGS)
    if source.where is None:
        reader = _local(files, reading_of(source), None, most)
    else:
        _refuse_unreadable(files)
        every = _reader(source, None, _fingerprint(files.names, facts_of(files)), ROW_RULES, files)
        reader = Chosen(every, range(min(len(every), most)), "")
    rows = Rows(reader, source.place, "", source, ROW_RULES, form)
    if len(rows) == 0:
        kept_none = " that `where` keeps" if source.where else ""
        raise DataError(f"holds no rows{kept_none}", where=rows.name, hint="give it at least one row")
    return rows


def reopen_source(
    source: Source, pin: PinnedSource, state: State | None, row_rules: int, form: str | None = None
) -> Rows:
    """The same rows in a worker process, with the facts of the first one. Raises DataError if a file is no longer in `state`."""
    reader = _reader(source, pin.revision, pin.fingerprint, row_rules)
    rows = Rows(reader, source.path or pin.name, pin.fingerprint, source, row_rules, form)
    _refuse_changed(rows, state)
    return rows
