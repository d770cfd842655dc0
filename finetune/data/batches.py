"""The micro-batches of an update or an evaluation, for this rank, known before any forward.

You pass in how to arrange and how to collate, so nothing here knows packing or tasks.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from finetune.data.bad_rows import BadRow
from finetune.data.example import Encoded, Example
from finetune.plan.plan import Counts

PIECE = 1 << 20  # examples
Batch = dict[str, Any]
"""What a task's `collate` makes for its own loss, which alone knows the keys: tensors, dictionaries of them, and lists for the host."""


class Examples:
    """All training examples of the sources, or all held-out ones; ids count through the sources.

    Takes 24 bytes of memory an example: its place in its source, and the four columns here.
    """

    def __init__(self, parts: Sequence[tuple[Encoded, np.ndarray, int]]):
        """Each part: the examples of a source, the ids of the chosen ones, and the number of its first row among all rows."""
        self._parts = parts
        self.sizes = tuple(len(chosen) for _, chosen, _ in parts)
        self._firsts = [0, *accumulate(self.sizes)]
        self.rows = _joined(parts, np.int64, lambda encoded, some, first_row: encoded.rows[some] + first_row)
        """Row of each example, counted through the sources."""
        self.lengths = _joined(
            parts, np.int32, lambda encoded, some, _: encoded.offsets[some + 1] - encoded.offsets[some]
        )
        self.targets = _joined(parts, np.int32, lambda encoded, some, _: encoded.targets[some])
        """Supervised tokens of each example."""
        self.cut_tokens = _joined(parts, np.int32, lambda encoded, some, _: encoded.cut_tokens[some])

    def __len__(self) -> int:
        return len(self.rows)

    def lost(self) -> tuple[int, int, int]:
        """Rows cut within their supervised tokens, supervised tokens lost, and supervised tokens in all; held-out rows included."""
        lost = np.concatenate([encoded.lost for encoded, _, _ in self._parts])
        tokens = int(lost[:, 1].sum())
        return len(lost), tokens, tokens + sum(int(encoded.targets.sum()) for encoded, _, _ in self._parts)

    def tokens_of_sources(self) -> list[int]:
        """Tokens of the examples of each source."""
        edges = zip(self._firsts, self._firsts[1:], strict=False)
        return [int(self.lengths[first:end].sum(dtype=np.int64)) for first, end in edges]

    @property
    def bad_rows(self) -> list[tuple[int, list[BadRow]]]:
        """Of each source the number of rows skipped as bad, and the first of them."""
        return [(encoded.bad_rows, encoded.first_bad_rows) for encoded, _, _ in self._parts]

    @property
    def columns(self) -> list[list[str] | None]:
        """Of each source."""
        return [encoded.columns for encoded, _, _ in self._parts]

    @property
    def said(self) -> list[str]:
        """How each source was read, for `plan`."""
        return [encoded.said for encoded, _, _ in self._parts]

    def __getitem__(self, example: int) -> Example:
        # From the right: an empty source begins where the next one does, and has no example.
        part = bisect_right(self._firsts, example) - 1
        encoded, chosen, _ = self._parts[part]
        return encoded[int(chosen[example - self._firsts[part]])]


def _joined(
    parts: Sequence[tuple[Encoded, np.ndarray, int]],
    dtype: type[np.integer],
    column: "Callable[[Encoded, np.ndarray, int], np.ndarray]",
) -> np.ndarray:
    """A column of the chosen examples of all parts, read a piece at a time."""
    joined: np.ndarray = np.empty(sum(len(chosen) for _, chosen, _ in parts), dtype)
    place = 0
    for encoded, chosen, first_row in parts:
        for start in range(0, len(chosen), PIECE):
            some = chosen[start : start + PIECE]
            joined[place : place + len(some)] = column(encoded, some, first_row)
            place += len(some)
    return joined


def select(
    encoded: Sequence[Encoded], rows: Sequence[int], held_out: np.ndarray, is_kept: bool
) -> tuple[Examples, Counts]:
    """The examples whose row is (or is not) in `held_out`, and their counts."""
    firsts = np.cumsum([0, *rows])
    parts, left_out = [], 0
    # `firsts` has one entry more: the number of all rows.
    for source, first in zip(encoded, firsts.tolist(), strict=False):
        parts.append((source, _chosen(source.rows, first, held_out, is_kept), first))
        left_out += len(_chosen(source.left_out_rows, first, held_out, is_kept))
    examples = Examples(parts)
    bad = 0 if is_kept else sum(source.bad_rows for source in encoded)
    counts = Counts(
        rows=len(held_out) if is_kept else sum(rows) - len(held_out) - bad,
        examples=len(examples),
        tokens=int(examples.lengths.sum()),
        supervised_tokens=int(examples.targets.sum()),
        cut_rows=int((examples.cut_tokens > 0).sum()),
        cut_tokens=int(examples.cut_tokens.sum()),
        left_out_rows=left_out,
        longest=int(examples.lengths.max(initial=0)),
        bad_rows=bad,
    )
    return examples, counts


def _chosen(rows: np.ndarray, first: int, held_out: np.ndarray, is_kept: bool) -> np.ndarray:
    """Ids of the mapped `rows` that are (or are not) in `held_out`; a piece at a time, for 4 bytes a row instead of 60."""
    dtype: type[np.integer] = np.int32 if len(rows) < 2**31 else np.int64
    pieces = [
        (start + np.flatnonzero(np.isin(rows[start : start + PIECE] + first, held_out) == is_kept)).astype(dtype)
        for start in range(0, len(rows), PIECE)
    ]
    return np.concatenate([np.zeros(0, dtype), *pieces])


@dataclass(frozen=True)
class MicroBatch:
    slot: int
    """Its place in the step, the same for every world size; seeds depend on it."""
    indices: list[int]
    """Which of the step's examples it holds."""
    is_idle: bool
    """It repeats another rank's work with weight 0, so that all ranks run the same number."""
    inputs: Batch
    places: torch.Tensor
    """`indices` as int64, to travel with the inputs: a list would make the device wait for the host."""


@dataclass(frozen=True)
class Batches:
    examples: Examples
    arrange: Callable[[Sequence[int], int], list[list[int]]]
    """(lengths, budget) -> the slots, each a list of indices into the step: `pack.packed` or `pack.padded`."""
    collate: Callable[[list[Example]], Batch]
    budget: int
    """Tokens of a micro-batch."""
    rank: int = 0
    world_size: int = 1

    def of(self, ids: np.ndarray) -> "MicroBatches":
        """The micro-batches of these examples that this rank runs: slots rank, rank + world size, and so on."""
        # Every rank arranges the whole step, so that all agree on the slots without a message.
        slots = self.arrange(self.examples.lengths[ids].tolist(), self.budget)
        return MicroBatches(self, ids, slots)

    def collated(self, ids: np.ndarray, slots: list[list[int]], slot: int) -> MicroBatch:
        is_idle = slot >= len(slots)
        # Any slot will do for an idle rank; the first one always exists.
        indices = slots[0 if is_idle else slot]
        inputs = self.collate([self.examples[example] for example in ids[indices].tolist()])
        return MicroBatch(slot, indices, is_idle, inputs, torch.from_numpy(np.array(indices, dtype=np.int64)))


@dataclass(frozen=True)
class MicroBatches:
    """Arranged at once, collated one by one: memory never holds a large step as a whole."""

    batches: Batches
    ids: np.ndarray
    slots: list[list[int]]
    """Of all ranks."""

    def __len__(self) -> int:
        # Rounded up: in the last turn, a rank without a slot runs an idle one.
        return -(-len(self.slots) // self.batches.world_size)

    def __getitem__(self, turn: int) -> MicroBatch:
        if not 0 <= turn < len(self):
            raise IndexError(turn)
        return self.batches.collated(self.ids, self.slots, self.batches.rank + turn * self.batches.world_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.__getitem__, range(len(self)))

    def on(self, device: torch.device) -> Iterator[MicroBatch]:
        """Each with its tensors on the device, in turn.

        The host queues work for a GPU in advance. While the GPU computes one, the host collates the next and copies it from
        pinned memory, on a second stream. A CPU reads the tensors as they are. Never run on a GPU.
        """
        if device.type == "cpu":
            yield from self
            return
        # Pinned memory and the streams below are CUDA's.
        if device.type != "cuda":
            for micro_batch in self:
                yield _moved(micro_batch, lambda tensor: tensor.to(device))
            return
        copying, computing = torch.Stream(device), torch.accelerator.current_stream(device)
        for micro_batch in self:
            with copying:
                # From ordinary memory, the host would wait for the copy.
                moved = _moved(micro_batch, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            # The device waits for the copy, the host goes on.
            computing.wait_stream(copying)
            for tensor in (moved.places, *tensors_of(moved.inputs)):
                tensor.record_stream(computing)  # otherwise its memory is reused too early
            yield moved


def _moved(micro_batch: MicroBatch, move: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    return replace(micro_batch, inputs=each_tensor(micro_batch.inputs, move), places=move(micro_batch.places))


def each_tensor(batch: Batch, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """Applies `move` to each tensor in nested dictionaries; everything else stays as it is."""

    def moved(value: object) -> object:
        if isinstance(value, dict):
            return each_tensor(value, move)
        return move(value) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in batch.items()}


def tensors_of(batch: Batch) -> Iterator[torch.Tensor]:
    for value in batch.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor):
            yield value
