"""Rows to cached examples: encoded once, kept as memory-mapped arrays, keyed by content.

Memory must not grow with the source: rows are encoded in shards, and the shards are joined on the disk.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import blake3

from finetune.data import bad_rows, encode_processes, shards
from finetune.data.example import Encoded, Encoder, Row, Rows
from finetune.data.shards import Work
from finetune.errors import DataError
from finetune.hosts.world import cores
from finetune.store import cache

SHARD_ROWS = 4096  # a kill costs each worker at most this: seconds
PARALLEL_ROWS = 65_536  # from here on workers are faster on two cores: each takes seconds to start
MOST_WORKERS = 16  # a quarter of a GiB each, plus the part of its source that a reader keeps


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
    facts = [str(shards.VERSION), *key, *(["skips bad rows"] if skips_bad else [])]
    digest = blake3.blake3("\n".join(facts).encode()).hexdigest()[:32]
    work = Work(rows, where, encoder, content, skips_bad)
    return Encoded(
        cache.built("encoded", digest, lambda directory: shards.join(directory, _encode(directory, work, reopen)))
    )


def workers() -> int:
    """One for each core that this process may use, at most `MOST_WORKERS`."""
    return min(cores(), MOST_WORKERS)


def _encode(directory: Path, work: Work, reopen: Callable[[], Work] | None) -> list[Path]:
    """The shards of a source in `directory`, in order; finished shards of an earlier build are reused."""
    count = len(work.rows)
    if count <= SHARD_ROWS:
        alone = directory / "shard"
        alone.mkdir()
        shards.write(alone, work, range(count))
        made = [alone]
        bad_rows.refuse_most(made, count)
    else:
        ranges = [range(count)[first : first + SHARD_ROWS] for first in range(0, count, SHARD_ROWS)]
        try:
            if reopen and count >= PARALLEL_ROWS and workers() > 1:
                made = encode_processes.encoded(directory, ranges, reopen, workers())
            else:
                made = shards.all_or_refusals((partial(shards.shard, directory, work, ids) for ids in ranges), ranges)
            bad_rows.refuse_most(made, count)
        except DataError:  # these shards are useless: the rows have to change, and their key with them
            for shard in directory.iterdir():
                shutil.rmtree(shard, ignore_errors=True)
            raise
    if not any(shards.examples_of(shard).size for shard in made):
        message, hint = (
            "no row has a supervised token within task.max_length",
            "raise task.max_length, or look at the rows",
        )
        raise DataError(message, where=work.where(0), hint=hint)
    return made
