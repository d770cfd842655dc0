"""The rows of a source that `where` and `take` keep. Their numbers are found once, and kept in the cache by the content of the source."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from blake3 import blake3

from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.data.sources.arrow import Kinds
from finetune.data.sources.files import Reader
from finetune.errors import DataError, counted
from finetune.recipe.conditions import ComparisonError, Condition, parse
from finetune.store import cache

VERSION = 1  # of the numbers in the cache
NUMBERS, FACTS = "rows.npy", "facts.json"
MOST_COLUMNS = 20  # that an error lists


class AbsentColumnError(DataError):
    """`where` names a column of no row."""


class Chosen:
    """Some rows of a reader, counted from 0."""

    def __init__(self, reader: Reader, rows: Sequence[int] | np.ndarray, about: str):
        self._reader, self._rows, self.about = reader, rows, f"{reader.about}, {about}"

    @property
    def kinds(self) -> Kinds | None:
        return self._reader.kinds

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._reader[int(self._rows[index])]

    def where(self, index: int) -> str:
        return self._reader.where(int(self._rows[index]))


def kept(reader: Reader, where: str | None, take: int | None, key: str) -> Reader:
    """What `where` and `take` keep of a reader; `key` names its content. Memory: 8 bytes a row where there is a `where`."""
    if where is None:
        first = range(len(reader) if take is None else min(len(reader), take))
        return reader if take is None else Chosen(reader, first, f"the first {counted(len(first), 'row')}")
    digest = blake3(json.dumps([VERSION, key, where, take]).encode()).hexdigest()[:32]
    made = cache.built("kept-rows", digest, partial(_build, reader, where, take))
    rows = np.load(made / NUMBERS, mmap_mode="r").view(np.ndarray)
    scanned = json.loads((made / FACTS).read_text())["scanned"]
    return Chosen(reader, rows, f"kept {len(rows):,} of {counted(scanned, 'row')}")


def _build(reader: Reader, where: str, take: int | None, directory: Path) -> None:
    rows, scanned = _found(reader, where, take)
    np.save(directory / NUMBERS, rows)
    (directory / FACTS).write_text(json.dumps({"scanned": scanned}))


def _found(reader: Reader, where: str, take: int | None) -> tuple[np.ndarray, int]:
    """The kept rows, and how many were looked at. Raises DataError where a column is in none of these."""
    conditions, seen = parse(where), set[Condition]()
    scanned = 0

    def rows() -> Iterator[int]:
        nonlocal scanned
        for index in range(len(reader)):
            scanned += 1
            if _keeps(reader, index, conditions, seen):
                yield index

    found = np.fromiter(islice(rows(), take), dtype=np.int64)
    if absent := next((each for each in conditions if each not in seen), None):
        names = list(reader[0]) if len(reader) else []
        more = f" and {len(names) - MOST_COLUMNS} more" if len(names) > MOST_COLUMNS else ""
        message = f"no column `{absent.column}`, there is {listed(names[:MOST_COLUMNS])}{more}"
        raise AbsentColumnError(message, where=reader.where(0), hint="correct `where` in the recipe")
    return found, scanned


def _keeps(reader: Reader, index: int, conditions: Sequence[Condition], seen: set[Condition]) -> bool:
    """Whether all conditions are true of a row, or it cannot be read: then `on_bad_row` decides. Those whose column it has are added to
    `seen`."""
    try:
        row, is_kept = reader[index], True
    except DataError:
        return True
    for condition in conditions:
        is_there, value = condition.found_in(row)
        if is_there:
            seen.add(condition)
        if not is_kept:
            continue
        try:
            is_kept = condition.keeps(value)
        except ComparisonError:
            said = f"`{condition.column}` is {json.dumps(value, default=str)[:40]}"
            message = f"{said}, which has no order with {json.dumps(condition.values[0])}"
            hint = f"put a condition before it, like `{condition.column} != ... and` in `where`"
            raise DataError(message, where=reader.where(index), hint=hint) from None
    return is_kept
