"""Floor 1. Rows of one source by position: a JSON Lines, Parquet or CSV file, or a Hub data set at a pinned revision.

`resolve` opens every source of a recipe to pin and to count it, `encode` reads its rows. A row is a plain dict of columns, renamed
as the recipe's `columns` say; what is wrong with it is a DataError that names its place, like `data/train.jsonl:12`.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from blake3 import blake3
from pydantic_core import from_json

from finetune import downloads
from finetune.errors import DataError
from finetune.plan import PinnedSource
from finetune.recipe.schema import Source

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, object]
State = tuple[int, ...]

SPLIT = "train"  # of a Hub data set, where the recipe names none
SCAN_BYTES = 16 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Reader(Protocol):
    """Rows of one place, under the column names that they have there."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def where(self, index: int) -> str: ...


class Rows:
    """The rows of a source, map-style; `fingerprint` speaks of their content alone, not of file names or times."""

    def __init__(self, reader: Reader, name: str, fingerprint: str, columns: Mapping[str, str]):
        self.name = name
        self.fingerprint = fingerprint
        self.state = state_of(name)
        self._reader = reader
        self._columns = dict(columns)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from 0; each field of `columns` holds its column, and the other columns keep their names."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows of {self.name}")
        row = self._reader[index]
        for field, column in self._columns.items():
            if column not in row:
                hint = f"correct `columns.{field}` in the recipe"
                raise DataError(f"no column `{column}`, there is {_listed(row)}", where=self.where(index), hint=hint)
        kept = {column: value for column, value in row.items() if column not in self._columns.values()}
        return kept | {field: row[column] for field, column in self._columns.items()}

    def where(self, index: int) -> str:
        """Where a person finds row `index`: the line of a file, or the row, from 0, of a Parquet file or data set."""
        return self._reader.where(index)


def open_source(source: Source, revision: str | None = None) -> Rows:
    """Opens a recipe's source and reads its first row; `revision` is a Hub data set's pin, found out here if not given."""
    if source.dataset is not None:
        if Path(source.dataset).exists():  # `datasets` would take that in place of the Hub's, whatever the pin
            raise DataError("is also the name of a local path", where=source.dataset, hint="train in another directory")
        pin = revision or pin_dataset(source)
        identity = json.dumps([source.dataset, pin, source.name, source.split or SPLIT]).encode()
        rows = Rows(HubDataset(source, pin), source.dataset, f"blake3:{blake3(identity).hexdigest()}", source.columns)
    else:
        reader = _reader_of(source.path)
        digest = blake3(max_threads=blake3.AUTO).update_mmap(source.path).hexdigest()
        rows = Rows(reader, source.path, f"blake3:{digest}", source.columns)
    if len(rows) == 0:
        raise DataError("holds no rows", where=rows.name, hint="training needs at least one")
    rows[0]  # so that a source of the wrong shape is refused before anything heavy happens
    return rows


def reopen_source(source: Source, pin: PinnedSource, state: State | None) -> Rows:
    """The same rows in another process, which takes what the first one found out; DataError where the file is no longer in `state`."""
    reader = _reader_of(source.path) if source.dataset is None else HubDataset(source, pin.revision)
    rows = Rows(reader, pin.name, pin.fingerprint, source.columns)
    if rows.state != state:
        raise DataError("was changed while it was encoded", where=rows.name, hint="run again when nothing writes to it")
    return rows


def state_of(name: str) -> State | None:
    """What changes with a file: device, inode, size and times. None where there is no file."""
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def pin_dataset(source: Source) -> str:
    """The commit of a Hub data set's `revision` now; without the Hub, the one seen last. A full commit hash is its own pin."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    try:
        return HfApi().resolve_revision(source.dataset, repo_type="dataset", revision=source.revision).resolved
    except (HTTPError, OSError, ValueError, RevisionResolutionError) as error:
        raise _hub_error(source, error) from error


def _reader_of(name: str) -> Reader:
    try:
        return _opened(Path(name))
    except PermissionError as error:
        hint = f"let user {os.geteuid()} read it, or train as another one"
        raise DataError("cannot be read: permission denied", where=name, hint=hint) from error


def _opened(file: Path) -> Reader:
    name = str(file)
    if not file.exists():
        raise DataError("no such file", where=name, hint="a path is seen from the working directory")
    if not file.is_file():
        raise DataError("is not a file", where=name, hint="list the files one by one in the recipe")
    if file.suffix.lower() not in READERS:
        ending = f"unknown ending `{file.suffix}`" if file.suffix else "has no ending"
        raise DataError(ending, where=name, hint="rows are read from .jsonl, .parquet and .csv")
    if file.stat().st_size == 0:
        raise DataError("is empty", where=name, hint="training needs at least one row")
    return READERS[file.suffix.lower()](name)


class JsonLines:
    """One JSON object a line. The file is mapped and a row is parsed when it is asked for; memory: 8 bytes a line, 16 where some are blank."""

    def __init__(self, name: str):
        self._name = name
        self._bytes = np.memmap(name, dtype=np.uint8, mode="r")
        size = len(self._bytes)
        scans = (range(size)[start : start + SCAN_BYTES] for start in range(0, size, SCAN_BYTES))
        newlines = [scan.start + np.flatnonzero(self._bytes[scan.start : scan.stop] == ord("\n")) for scan in scans]
        end = [] if self._bytes[-1] == ord("\n") else [size]
        self._edges = np.concatenate([[-1], *newlines, end]).astype(np.int64)  # line k is between edges k and k + 1
        firsts = self._bytes[self._edges[:-1] + 1]
        blanks = [line for line in np.flatnonzero(np.isin(firsts, list(b" \t\r\n"))) if not self._line(line).strip()]
        self._lines = np.delete(np.arange(len(firsts)), blanks) if blanks else range(len(firsts))

    def _line(self, line: int) -> bytes:
        content = self._bytes[self._edges[line] + 1 : self._edges[line + 1]].tobytes()
        return content.removeprefix(BYTE_ORDER_MARK) if line == 0 else content

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        content = self._line(self._lines[index])
        hint = 'each line holds one JSON object, like `{"text": "..."}`'
        if content.lstrip().startswith(b"["):
            hint += "; `jq -c '.[]'` makes lines of an array"
        try:
            row = from_json(content.decode())
        except UnicodeDecodeError as error:
            raise DataError("is not UTF-8 text", where=self.where(index), hint="save the file as UTF-8") from error
        except ValueError as error:
            reason = re.sub(r" at line \d+ column (\d+)$", r" at column \1", str(error))
            raise DataError(f"bad JSON: {reason}", where=self.where(index), hint=hint) from error
        if not isinstance(row, dict):
            raise DataError("is not a JSON object", where=self.where(index), hint=hint)
        return row

    def where(self, index: int) -> str:
        return f"{self._name}:{self._lines[index] + 1}"


class Csv:
    """Comma-separated values under one line of column names (RFC 4180), in UTF-8; held in memory, every value is text."""

    def __init__(self, name: str):
        self._name = name
        content = Path(name).read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError("is not UTF-8 text", where=f"{name}:{line}", hint="save the file as UTF-8") from error
        csv.field_size_limit(sys.maxsize)  # the default refuses values over 131,072 characters
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        self._rows: list[tuple[int, list[str]]] = []
        start = 1
        try:
            for values in lines:
                if values:
                    self._rows.append((start, values))
                start = lines.line_num + 1
        except csv.Error as error:
            hint = "a quote inside a quoted value is written twice"
            raise DataError(f"bad CSV: {error}", where=f"{name}:{start}", hint=hint) from error
        self._columns = self._rows.pop(0)[1] if self._rows else []
        self._check()

    def _check(self) -> None:
        if len(set(self._columns)) < len(self._columns):
            raise DataError(f"repeated column name among {_listed(self._columns)}", where=f"{self._name}:1")
        for line, values in self._rows:
            if len(values) != len(self._columns):
                message = f"{len(values)} values for {len(self._columns)} columns"
                hint = "put a value that holds a comma in double quotes"
                raise DataError(message, where=f"{self._name}:{line}", hint=hint)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return dict(zip(self._columns, self._rows[index][1], strict=True))

    def where(self, index: int) -> str:
        return f"{self._name}:{self._rows[index][0]}"


class Parquet:
    """A Parquet file; the two row groups read last stay in memory."""

    def __init__(self, name: str):
        import pyarrow
        from pyarrow.parquet import ParquetFile

        self._name = name
        self._damage = (pyarrow.ArrowException, OSError)
        try:
            file = ParquetFile(name, memory_map=True)
        except self._damage as error:
            raise DataError("is not a whole Parquet file", where=name, hint="write or fetch it again") from error
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._read_group = lru_cache(maxsize=2)(file.read_row_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            return self._read_group(group).slice(index - self._starts[group], 1).to_pylist()[0]
        except self._damage as error:
            raise DataError(f"is damaged: {_first_line(error)}", where=self.where(index)) from error

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"


class HubDataset:
    """A split of a Hub data set at one commit, in the cache of `datasets`; a split may be a slice, like `train[:100]`."""

    def __init__(self, source: Source, revision: str):
        from datasets.exceptions import DatasetsError
        from httpx2 import HTTPError

        self._place = f"{source.dataset}@{revision[:8]} {source.split or SPLIT}"
        try:
            self._rows = _load(source, revision)
        except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: it is a script
            raise _hub_error(source, error) from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self._place} row {index}"


def _load(source: Source, revision: str) -> "Dataset":
    """The split at the pin: where `datasets` has made it before, from its cache without a request."""
    from datasets import load_dataset
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    split, name = source.split or SPLIT, source.dataset.rpartition("/")[2]
    made = Cache(
        repo_id=source.dataset,
        dataset_name=name,
        config_name=source.name or "default",
        version="0.0.0",
        hash=revision,
    )
    if Path(made.cache_dir).is_dir():
        rows = made.as_dataset(split=split)
    else:
        rows = load_dataset(source.dataset, source.name, split=split, revision=revision)
    if any(Path(file["filename"]).parent.name != revision for file in rows.cache_files):
        raise ConnectionError("without the Hub, `datasets` gives the revision it cached last, whatever was asked for")
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source.dataset, repo_type="dataset"))
    made_of_them = next((str(Path(file["filename"]).parent) for file in rows.cache_files), "")
    files = (folder / "snapshots" / revision).rglob("*")
    downloads.refuse_damaged(files, DataError, f"{source.dataset}@{revision}", made_of_them)
    return rows


READERS: dict[str, Callable[[str], Reader]] = {
    ".jsonl": JsonLines,
    ".json": JsonLines,
    ".parquet": Parquet,
    ".csv": Csv,
}


def _hub_error(source: Source, error: Exception) -> DataError:
    from datasets.exceptions import DatasetNotFoundError
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError, RevisionResolutionError

    if refusal := downloads.refusal_of_disk(error, DataError, f"HF_HOME={constants.HF_HOME}"):
        return refusal
    if "is a gated dataset" in str(error):  # DatasetNotFoundError hides the Hub's own error
        message, hint = "is gated", "ask for access at its page, then set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError) or isinstance(error.__cause__, RevisionNotFoundError):
        message, hint = (
            f"has no revision `{source.revision}`",
            "correct `revision`, or leave it out for the main branch",
        )
    elif isinstance(error, DatasetNotFoundError | RepositoryNotFoundError):
        message, hint = "no such data set on the Hub", "check its name; a private or gated one needs `hf auth login`"
    elif isinstance(error, ConnectionError | TransportError | RevisionResolutionError):
        message, hint = "the Hub cannot be reached", "check the network, or name a local file with `path`"
    else:
        message, hint = f"cannot be loaded: {_first_line(error)}", "check `name`, `split` and `revision` in the recipe"
    return DataError(message, where=source.dataset, hint=hint)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns)
