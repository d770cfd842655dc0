"""The rows of a source that were skipped as bad: listed in its cache entry, one JSON object a line, never in silence."""

import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TypedDict

from finetune.errors import DataError

FILE = "bad.jsonl"
SHOWN = 5  # by `plan`, of each source
HINT = "most rows do not fit: look at the file, or name its shape with data.train[].format"


class BadRow(TypedDict):
    row: int
    """From 0."""
    where: str
    message: str


def write(directory: Path, refused: Mapping[int, DataError]) -> None:
    """Lists the bad rows of a shard, in the order of their numbers."""
    with (directory / FILE).open("w") as file:
        for row, error in sorted(refused.items()):
            file.write(json.dumps({"row": row, "where": error.where or "", "message": error.message}) + "\n")


def join(directory: Path, shards: Sequence[Path]) -> None:
    """One list of those of all shards, if they have any."""
    files = [shard / FILE for shard in shards if (shard / FILE).exists()]
    if files:
        with (directory / FILE).open("wb") as whole:
            for file in files:
                with file.open("rb") as stream:
                    shutil.copyfileobj(stream, whole, 1 << 20)


def read(directory: Path) -> Generator[BadRow, None, None]:
    """The bad rows of a shard or of a source."""
    if (directory / FILE).exists():
        with (directory / FILE).open() as file:
            yield from map(json.loads, file)


def first(directory: Path) -> list[BadRow]:
    with closing(read(directory)) as rows:
        return list(islice(rows, SHOWN))


def count(directory: Path) -> int:
    return sum(1 for _ in read(directory))


def refuse_most(shards: Sequence[Path], rows: int) -> None:
    """Raises DataError if more than half of the rows are bad."""
    bad = sum(map(count, shards))
    if bad * 2 > rows:
        one = next(first(shard)[0] for shard in shards if count(shard))
        message = f"{bad:,} of {rows:,} rows are bad, more than half; the first one {one['message']}"
        raise DataError(message, where=one["where"], hint=HINT)
