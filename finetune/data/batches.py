"""Floor 1. The micro-batches of an update or an evaluation, for this rank, known before any forward.

`Examples` joins the chosen part of several sources under one numbering; `Batches.of(ids)` arranges any of them. How to
arrange and how to collate are passed in, so nothing here knows packing or tasks. `loop` is the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.example import Encoded, Example


class Examples:
    """The examples of all sources that are trained on, or all that are held out; ids count through the sources."""

    def __init__(self, parts: Sequence[tuple[Encoded, np.ndarray, int]]):
        """Each part: the examples of a source, which of them count, and the number of its first row among all rows."""
        self._parts = parts
        self.sizes = tuple(len(chosen) for _, chosen, _ in parts)
        self._firsts = np.cumsum([0, *self.sizes])
        self.rows = _joined(parts, lambda encoded, chosen, first_row: encoded.rows[chosen] + first_row)
        """Row of each example, counted through the sources."""
        self.lengths = _joined(parts, lambda encoded, chosen, _: np.diff(encoded.offsets)[chosen])
        self.targets = _joined(parts, lambda encoded, chosen, _: encoded.targets[chosen])
        """Supervised tokens of each example."""
        self.cut_tokens = _joined(parts, lambda encoded, chosen, _: encoded.cut_tokens[chosen])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, example: int) -> Example:
        part = int(np.searchsorted(self._firsts, example, side="right")) - 1
        encoded, chosen, _ = self._parts[part]
        return encoded[chosen[example - self._firsts[part]]]


def _joined(parts: Sequence[tuple[Encoded, np.ndarray, int]], column: Callable) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(column(*part) for part in parts)])


@dataclass(frozen=True)
class MicroBatch:
    slot: int
    """Its place in the step, the same for every world size; seeds depend on it."""
    indices: list[int]
    """Which of the step's examples it holds."""
    is_idle: bool
    """It repeats another rank's work with weight 0, so that all ranks run equally many."""
    inputs: dict


@dataclass(frozen=True)
class Batches:
    examples: Examples
    arrange: Callable[[Sequence[int], int], list[list[int]]]
    """(lengths, budget) -> the slots, each a list of indices into the step: `pack.packed` or `pack.padded`."""
    collate: Callable[[list[Example]], dict]
    budget: int
    """Tokens of a micro-batch."""
    rank: int = 0
    world_size: int = 1

    def of(self, ids: np.ndarray) -> list[MicroBatch]:
        """The micro-batches of these examples that this rank runs: slots rank, rank + world size, and so on."""
        slots = self.arrange(self.examples.lengths[ids].tolist(), self.budget)
        rounds = -(-len(slots) // self.world_size)
        return [self._micro_batch(ids, slots, self.rank + turn * self.world_size) for turn in range(rounds)]

    def _micro_batch(self, ids: np.ndarray, slots: list[list[int]], slot: int) -> MicroBatch:
        is_idle = slot >= len(slots)
        indices = slots[0 if is_idle else slot]
        return MicroBatch(slot, indices, is_idle, self.collate([self.examples[int(ids[index])] for index in indices]))
