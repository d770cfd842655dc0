"""Floor 1. Rows to cached examples: encoded once, kept as memory-mapped arrays, keyed by content.

`resolve` calls `encode` with the rows of a source and the encoder of a task; `batches` reads what it returns.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import blake3
import numpy as np

from finetune import cache
from finetune.errors import DataError
from finetune.example import Encoded, Example

VERSION = 1  # of the format below; part of every key
ROWS_AT_ONCE = 512  # rows a call of the encoder: enough for the tokenizer's threads, small enough for memory

# rows and their places in, the examples of each row out
Encoder = Callable[[Sequence[dict], Sequence[str]], list[list[Example]]]


def encode(rows: Sequence[dict], where: Callable[[int], str], encoder: Encoder, *key: str) -> Encoded:
    """The examples of `rows`, from the cache when the same content was encoded with the same settings before.

    `key` names the content of the rows and the settings of the encoder. A row whose supervised tokens were all cut off
    is left out and counted; a row that has none to begin with is an error of the encoder's.
    """
    digest = blake3.blake3("\n".join([str(VERSION), *key]).encode()).hexdigest()[:32]
    return Encoded(cache.built("encoded", digest, lambda directory: _write(directory, rows, where, encoder)))


def _write(directory: Path, rows: Sequence[dict], where: Callable[[int], str], encoder: Encoder) -> None:
    lengths, row_ids, targets, cut_tokens, left_out = [], [], [], [], []
    with open(directory / "tokens.raw", "wb") as tokens, open(directory / "supervised.raw", "wb") as supervised:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            ids = range(first, min(first + ROWS_AT_ONCE, len(rows)))
            encoded = encoder([rows[row] for row in ids], [where(row) for row in ids])
            for row, examples in zip(ids, encoded, strict=True):
                kept = [example for example in examples if example.supervised[1:].any()]
                if not kept:
                    left_out.append(row)
                for example in kept:
                    tokens.write(example.tokens.astype(np.int32).tobytes())
                    supervised.write(example.supervised.astype(bool).tobytes())
                    lengths.append(len(example.tokens))
                    row_ids.append(row)
                    targets.append(int(example.supervised[1:].sum()))
                    cut_tokens.append(example.cut_tokens)
    if not lengths:
        raise DataError(
            "no row has a supervised token within task.max_length",
            where=where(0),
            hint="raise task.max_length, or look at the rows",
        )
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    for name, values in (("rows", row_ids), ("targets", targets), ("cut_tokens", cut_tokens)):
        np.save(directory / f"{name}.npy", np.array(values, dtype=np.int64))
    (directory / "left_out.json").write_text(json.dumps(left_out))
    for name, dtype in (("tokens", np.int32), ("supervised", np.bool_)):
        raw = directory / f"{name}.raw"
        np.save(directory / f"{name}.npy", np.memmap(raw, dtype=dtype, mode="r"))
        raw.unlink()
