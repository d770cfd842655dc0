"""Rows to cached examples: encoded once, kept as memory-mapped arrays, keyed by content.

Memory must not grow with the source: rows are encoded in shards, and the shards are joined on the disk.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import blake3

from finetune.data import bad_rows, encode_processes, shards
from finetune.data.example import Encoded, Encoder, Row, Rows
from finetune.data.shards import Work
from finetune.errors import DataError
from finetune.hosts.world import cores
from finetune.store import cache, shared_parts

KIND = "encoded"  # of entries in the cache
SHARD_ROWS = 4096  # a kill costs each worker at most this: seconds
PARALLEL_ROWS = 65_536  # from here on workers are faster on two cores: each takes seconds to start
MOST_WORKERS = 16  # a quarter of a GiB each, plus the part of its source that a reader keeps


class Part(NamedTuple):
    """The shards of one of several tasks."""

    number: int
    """From 1."""
    of: int


def encode(
    rows: Rows,
    where: Callable[[int], str],
    encoder: Encoder,
    *key: str,
    content: Callable[[Row], object] = lambda row: row,
    reopen: Callable[[], Work] | None = None,
    skips_bad: bool = False,
) -> Encoded:
    """The examples of `rows`, from the cache if the same content was encoded with the same settings before.

    `key` names the content of the rows and the settings of the encoder. A row is skipped and counted if all its supervised tokens
    were cut off; if it has none to begin with, the encoder raises. `reopen` makes the same work in worker processes, for sources
    with many rows; the result is the same to the byte. `skips_bad` skips and lists bad rows, unless they are more than half.
    """
    work, digest = Work(rows, where, encoder, content, skips_bad), digest_of(key, skips_bad)
    entry = cache.built(
        KIND, digest, lambda directory: shards.join(directory, _encode(directory, digest, work, reopen))
    )
    shared_parts.remove(KIND, digest)
    return Encoded(entry)


def encode_part(
    rows: Rows,
    where: Callable[[int], str],
    encoder: Encoder,
    *key: str,
    part: Part,
    content: Callable[[Row], object] = lambda row: row,
    reopen: Callable[[], Work] | None = None,
    skips_bad: bool = False,
) -> Encoded | None:
    """Makes the shards of one of several tasks on a shared file system; what `encode` returns, once all shards are there.

    A finished shard is not made again, whichever task made it. The last task joins them; so does `encode`.
    """
    work, digest = Work(rows, where, encoder, content, skips_bad), digest_of(key, skips_bad)
    ranges = ranges_of(len(rows))
    own = ranges[len(ranges) * (part.number - 1) // part.of : len(ranges) * part.number // part.of]
    try:
        if not shared_parts.is_there(KIND, digest):
            missing = [ids for ids in own if not shared_parts.found(KIND, digest, shards.name_of(ids))]
            _made(shared_parts.opened(KIND, digest), missing, work, reopen)
            names = [*map(shards.name_of, ranges)]
            if not shared_parts.are_there(KIND, digest, names) and not shared_parts.is_there(KIND, digest):
                return None
    except OSError:
        if not shared_parts.is_there(KIND, digest):  # else others made all of it, joined the shards and removed them
            raise
    return encode(rows, where, encoder, *key, content=content, reopen=reopen, skips_bad=skips_bad)


def digest_of(key: Sequence[str], skips_bad: bool) -> str:
    facts = [str(shards.VERSION), *key, *(["skips bad rows"] if skips_bad else [])]
    return blake3.blake3("\n".join(facts).encode()).hexdigest()[:32]


def ranges_of(count: int) -> list[range]:
    """The rows of each shard."""
    return [range(count)[first : first + SHARD_ROWS] for first in range(0, count, SHARD_ROWS)]


def workers() -> int:
    """One for each core that this process may use, at most `MOST_WORKERS`."""
    return min(cores(), MOST_WORKERS)


def _encode(directory: Path, digest: str, work: Work, reopen: Callable[[], Work] | None) -> list[Path]:
    """The shards of a source, in order; finished ones of an earlier build in `directory`, and of other hosts, are reused."""
    ranges = ranges_of(len(work.rows))
    shared = {ids: shared_parts.found(KIND, digest, shards.name_of(ids)) for ids in ranges}
    missing = [ids for ids, path in shared.items() if path is None]
    try:
        if missing == ranges[:1] == ranges[-1:]:  # one that is lost with its build needs no seal
            (alone := directory / "shard").mkdir()
            shards.write(alone, work, ranges[0])
            return _with_examples([alone], work)
        made = dict(zip(missing, _made(directory, missing, work, reopen), strict=True))
    except DataError:  # these shards are useless: the rows have to change, and their key with them
        for shard in directory.iterdir():
            shutil.rmtree(shard, ignore_errors=True)
        raise
    return _with_examples([shared[ids] or made[ids] for ids in ranges], work)


def _with_examples(paths: list[Path], work: Work) -> list[Path]:
    """The shards. DataError if most rows are bad, or none has an example."""
    bad_rows.refuse_most(paths, len(work.rows))
    if not any(shards.examples_of(shard).size for shard in paths):
        message, hint = (
            "no row has a supervised token within task.max_length",
            "raise task.max_length, or look at the rows",
        )
        raise DataError(message, where=work.where(0), hint=hint)
    return paths


def _made(directory: Path, ranges: Sequence[range], work: Work, reopen: Callable[[], Work] | None) -> Sequence[Path]:
    """The shards of these rows in `directory`, by worker processes if there are many."""
    if reopen and sum(map(len, ranges)) >= PARALLEL_ROWS and workers() > 1:
        return encode_processes.encoded(directory, ranges, reopen, workers())
    return shards.all_or_refusals((partial(shards.shard, directory, work, ids) for ids in ranges), ranges)
