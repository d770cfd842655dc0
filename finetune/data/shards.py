"""Shards of encoded rows as arrays on the disk: written one by one, then joined to the files of `Encoded`."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finetune.data import bad_rows
from finetune.data.example import Encoder, Example, Row, Rows
from finetune.data.refusals import together
from finetune.errors import DataError
from finetune.plan.split import BAD, content_of
from finetune.store import cache

VERSION = 3  # of the format below; part of every key
LOOK_ON_SHARDS = 3  # after one with a bad row: reports many bad rows at once, in a few seconds
ROWS_AT_ONCE = 512  # rows in one call of the encoder: enough for the tokenizer's threads
MOST_COLUMNS = 1000  # of a source, kept by name
CHARACTERS_AT_ONCE = 1 << 20  # in one call; each takes some 100 bytes of memory meanwhile, in each worker


@dataclass(frozen=True)
class Work:
    """A source, and the functions that encode it."""

    rows: Rows
    where: Callable[[int], str]
    encoder: Encoder
    content: Callable[[Row], object] = lambda row: row
    """The part of a row that identifies it: rows with equal content are the same row."""
    skips_bad: bool = False
    """Skips and lists rows that cannot be read or encoded, in place of raising."""


def all_or_refusals(makers: Iterable[Callable[[], Path]], ranges: Sequence[range]) -> list[Path]:
    """The shards in order. If a shard has bad rows, raises them together with those of the next `LOOK_ON_SHARDS`."""
    shards, refused, first = [], [], None
    for number, (make, ids) in enumerate(zip(makers, ranges, strict=True)):
        try:
            shards.append(make())
        except DataError as error:
            if not error.parts:  # not about rows
                raise
            refused += error.parts
            first = number if first is None else first
        if first is not None and (number == first + LOOK_ON_SHARDS or ids is ranges[-1]):
            raise together(refused, ids.stop)
    return shards


def shard(directory: Path, work: Work, ids: range) -> Path:
    """The shard of these rows in `directory`; a finished one of an earlier build is reused."""
    return cache.part(directory, name_of(ids), partial(write, work=work, ids=ids))


def name_of(ids: range) -> str:
    return f"rows-{ids.start}-{ids.stop}"


def write(directory: Path, work: Work, ids: range) -> None:
    """`tokens.raw`, `supervised.raw`, `left_out.npy` (rows), `lost.npy` (rows and their lost targets), `contents.npy`, `columns.json`, `numbers.npy` where examples have numbers, `bad.jsonl` where bad rows are skipped, and `examples.npy`: length, row, targets and cut tokens of each."""
    examples, numbers, left_out, lost = [], [], [], []
    contents = np.full(len(ids), BAD, dtype=np.uint64)
    columns: dict[str, None] = {}
    refused: dict[int, DataError] = {}
    with open(directory / "tokens.raw", "wb") as tokens, open(directory / "supervised.raw", "wb") as supervised:
        for some, rows in _calls(work, ids, refused):
            accepted = _encoded(work, some, rows, refused)
            for row, values in zip(some, rows, strict=True):
                if row in accepted:
                    contents[row - ids.start] = content_of(work.content(values))
                    columns |= dict.fromkeys(values)
            for row, encoded in accepted.items():
                # Nothing predicts the first token of an example, so its mask does not count.
                kept = [example for example in encoded if example.supervised[1:].any()]
                if not kept:
                    left_out.append(row)
                if lost_targets := sum(example.lost_targets for example in encoded):
                    lost.append((row, lost_targets))
                for example in kept:
                    tokens.write(example.tokens.astype(np.int32).tobytes())
                    supervised.write(example.supervised.astype(bool).tobytes())
                    targets = int(example.supervised[1:].sum())
                    examples.append((len(example.tokens), row, targets, example.cut_tokens))
                    numbers.append(example.numbers)
    if refused and not work.skips_bad:
        raise together([refused[row] for row in sorted(refused)], ids.stop)
    if work.skips_bad:
        bad_rows.write(directory, refused)
    np.save(directory / "examples.npy", np.array(examples, dtype=np.int64).reshape(-1, 4))
    if any(numbers):
        np.save(directory / "numbers.npy", np.array(numbers, dtype=np.float64))
    np.save(directory / "left_out.npy", np.array(left_out, dtype=np.int64))
    np.save(directory / "lost.npy", np.array(lost, dtype=np.int64).reshape(-1, 2))
    np.save(directory / "contents.npy", contents)
    # Bounded: rows of free-form JSON may have a new key each.
    (directory / "columns.json").write_text(json.dumps([*columns][:MOST_COLUMNS]))


def _calls(work: Work, ids: range, refused: dict[int, DataError]) -> Iterator[tuple[list[int], list[Row]]]:
    """Rows for one call of the encoder, with their numbers. Unreadable rows are added to `refused`."""
    some, rows, characters = [], [], 0
    for row in ids:
        try:
            rows.append(work.rows[row])
        except DataError as error:
            refused[row] = error
            continue
        some.append(row)
        characters += _characters(rows[-1])
        if len(some) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield some, rows
            some, rows, characters = [], [], 0
    if some:
        yield some, rows


def _characters(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list):
        return len(value) if isinstance(value, str) else 1
    return sum(map(_characters, value))


def _encoded(
    work: Work, ids: Sequence[int], rows: list[Row], refused: dict[int, DataError]
) -> dict[int, list[Example]]:
    """The examples of each good row. Each bad row is added to `refused`."""
    places = [work.where(row) for row in ids]
    try:
        return dict(zip(ids, work.encoder(rows, places), strict=True))
    except DataError:
        good, alone = {}, {}
        for number, row, place in zip(ids, rows, places, strict=True):
            try:
                [good[number]] = work.encoder([row], [place])
            except DataError as error:
                alone[number] = error
        if not alone:  # no single row is bad
            raise
        refused |= alone
        return good


def examples_of(shard: Path) -> np.ndarray:
    """A row for each example of a shard: length, row, targets and cut tokens."""
    return np.load(shard / "examples.npy", mmap_mode="r")


def join(directory: Path, shards: Sequence[Path]) -> None:
    """Writes the files of `Encoded` from those of its shards, with one shard in memory at a time."""
    sizes = np.array([len(examples_of(shard)) for shard in shards])
    kinds: tuple[tuple[str, type[np.generic]], ...] = (("tokens", np.int32), ("supervised", np.bool_))
    for name, dtype in kinds:
        raw = [shard / f"{name}.raw" for shard in shards]
        with _array(directory / f"{name}.npy", dtype, sum(file.stat().st_size for file in raw)) as array:
            for file in raw:
                with file.open("rb") as stream:
                    shutil.copyfileobj(stream, array, 1 << 20)
    for column, name, kind in ((1, "rows", np.int64), (2, "targets", np.int32), (3, "cut_tokens", np.int32)):
        _write(directory / f"{name}.npy", kind, sizes.sum(), (examples_of(shard)[:, column] for shard in shards))
    _write(directory / "offsets.npy", np.int64, sizes.sum() + 1, _offsets(shards))
    for name in ("left_out", "lost", "contents"):
        np.save(directory / f"{name}.npy", np.concatenate([np.load(shard / f"{name}.npy") for shard in shards]))
    if numbered := [shard / "numbers.npy" for shard in shards if (shard / "numbers.npy").exists()]:
        np.save(directory / "numbers.npy", np.concatenate([np.load(file) for file in numbered]))
    bad_rows.join(directory, shards)
    if not all((shard / "columns.json").exists() for shard in shards):
        return  # a shard written by older code, before a kill
    columns = [json.loads((shard / "columns.json").read_text()) for shard in shards]
    (directory / "columns.json").write_text(json.dumps([*dict.fromkeys(chain(*columns))][:MOST_COLUMNS]))


def _offsets(shards: Sequence[Path]) -> Iterator[np.ndarray]:
    last = np.zeros(1, dtype=np.int64)
    yield last
    for shard in shards:
        ends = last[-1] + np.cumsum(examples_of(shard)[:, 0])
        last = ends if len(ends) else last
        yield ends


def _write(path: Path, dtype: type, count: int, pieces: Iterable[np.ndarray]) -> None:
    with _array(path, dtype, int(count) * np.dtype(dtype).itemsize) as array:
        for piece in pieces:
            array.write(piece.astype(dtype).tobytes())


@contextmanager
def _array(path: Path, dtype: type, size: int) -> Iterator[BinaryIO]:
    """A flat .npy file of `size` bytes: writes its header, and the caller writes the rest."""
    shape = (size // np.dtype(dtype).itemsize,)
    head = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        yield file
