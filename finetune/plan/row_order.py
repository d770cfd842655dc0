"""The examples of an update: a pure function of (seed, step), for any world size, with no state to store.

An epoch is a keyed permutation of the examples (a balanced Feistel network with cycle walking: Black & Rogaway 2002, "Ciphers with
Arbitrary Finite Domains"), so seeking to any position costs the same. `mixture` has the source of a position.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from finetune.plan import mixture
from finetune.plan.mixture import Stretch

DRAWN_AT_ONCE = 256  # examples
ROUNDS = 6  # 4 suffice against distinguishers of this strength (Luby & Rackoff 1988); 6 cost nothing measurable


def derive(*parts: int | str) -> int:
    """64 bits that depend on all parts: the seed of one purpose, such as derive(seed, step, slot)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(positions: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """Images of `positions` (int64, each in [0, size)) under the permutation of range(size) that `key` names."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = [np.uint64(derive("feistel", *key, number)) for number in range(ROUNDS)]
    images = np.asarray(positions).astype(np.uint64)
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():  # the network permutes a power of 4 below 4 * size: on average under four walks
        walked = images[outside]
        left, right = walked >> shift, walked & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        images[outside] = (left << shift) | right
        outside = images >= np.uint64(size)
    return images.astype(np.int64)


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """The order of `sizes` examples (one entry a source) drawn with `weights`; example ids count through the sources.

    Without weights every example is drawn exactly once an epoch. With weights an epoch draws as many examples as there
    are, each source gets its share of every stretch, and a source that runs out starts its next permutation. With stretches
    an epoch consists of these.
    """

    seed: int
    batch_size: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    before: "Order | None" = None
    """The order up to update `until`, where a branch went on with another seed or batch size ..."""
    until: int = 0
    start: int = 0
    """... and the examples drawn by then: the next update begins at this position."""
    stretches: tuple[Stretch, ...] = ()
    """Of an epoch, instead of weights."""
    is_shuffled: bool = True
    """Else each source comes in the order of its file."""

    @property
    def _earlier(self) -> "Order":
        if self.before is None:
            raise ValueError("nothing is before this order: it begins at position 0")
        return self.before

    @property
    def examples_per_epoch(self) -> int:
        return sum(stretch.length for stretch in self.stretches) if self.stretches else sum(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples_per_epoch // self.batch_size)

    def examples_of(self, step: int) -> np.ndarray:
        """Example ids (int64) of update `step`, counted from 1. An update never crosses an epoch's edge."""
        at_once = max(1, DRAWN_AT_ONCE // self.batch_size)
        block, place = divmod(step - 1, at_once)
        return _examples_of_steps(self, block * at_once + 1, at_once)[place]

    def positions_of(self, step: int) -> np.ndarray:
        """The positions of an update's examples, counted from the start of the run."""
        if step <= self.until:
            return self._earlier.positions_of(step)
        begun = -self.start % self.examples_per_epoch  # examples left in the epoch that `start` lies in
        steps_in_begun = -(-begun // self.batch_size)
        index = step - self.until - 1
        if index < steps_in_begun:
            first, end = self.start, self.start + begun
        else:
            epoch, index = divmod(index - steps_in_begun, self.steps_per_epoch)
            first = self.start + begun + epoch * self.examples_per_epoch
            end = first + self.examples_per_epoch
        first += index * self.batch_size
        return np.arange(first, min(first + self.batch_size, end), dtype=np.int64)

    def drawn_after(self, step: int) -> int:
        """Examples that the updates up to `step` draw together."""
        return int(self.positions_of(step)[-1]) + 1 if step else 0

    def epochs_after(self, step: int) -> float:
        """Epochs that the updates up to `step` make, by their examples."""
        return self.drawn_after(step) / self.examples_per_epoch

    def last_step_of(self, epoch: int) -> int:
        """The update that ends epoch `epoch`, counted from 1; `until` where that is over by then."""
        whole, begun = divmod(epoch * self.examples_per_epoch - self.start, self.examples_per_epoch)
        return self.until + max(0, whole * self.steps_per_epoch + -(-begun // self.batch_size))

    def examples_at(self, positions: np.ndarray) -> np.ndarray:
        """Example ids at absolute positions (int64), counted from the start of the run."""
        rest = np.asarray(positions)
        examples, where = np.empty_like(rest), np.arange(len(rest))
        if (is_before := rest < self.start).any():
            examples[is_before] = self._earlier.examples_at(rest[is_before])
            rest, where = rest[~is_before], where[~is_before]
        before, after = self.drawn_of_sources(rest), self.drawn_of_sources(rest + 1)
        sources, first = np.argmax(after > before, axis=1), 0
        for source, size in enumerate(self.sizes):
            is_here = sources == source
            examples[where[is_here]] = first + self._members(source, before[is_here, source])
            first += size
        return examples

    def drawn_of_sources(self, positions: np.ndarray) -> np.ndarray:
        """Draws of each source before each of these positions (int64, shape (positions, sources))."""
        if self.stretches:
            return mixture.drawn_in(self.stretches, positions)
        shares = mixture.integers(self.weights) if self.weights else self.sizes
        return mixture.drawn(shares, positions, is_even=False)

    def _members(self, source: int, draws: np.ndarray) -> np.ndarray:
        """Which example of a source each of its draws is, counted from the start of the run."""
        size = self.sizes[source]
        if not self.is_shuffled:
            return draws % size
        members = np.empty_like(draws)
        epochs, within = np.divmod(draws, size)
        begun, begun_at = divmod(_drawn_of(self, source) if self.before else 0, size)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            if epoch == begun and begun_at:
                members[chosen] = self._unseen(source, within[chosen], int(epoch), begun_at)
            else:
                members[chosen] = permute(within[chosen], size, self.seed, source, int(epoch))
        return members

    def _unseen(self, source: int, within: np.ndarray, epoch: int, begun_at: int) -> np.ndarray:
        """The same in an epoch that `before` began: what it left, in an order of this seed."""
        size = self.sizes[source]
        if self.seed != self._earlier.seed:
            key = (self.seed, source, epoch, "left by", self.until)
            within = begun_at + permute(within - begun_at, size - begun_at, *key)
        return self._earlier._members(source, epoch * size + within)


@lru_cache(maxsize=64)
def _drawn_of(order: Order, source: int) -> int:
    """Draws of a source before `order.start`."""
    return int(order.drawn_of_sources(np.array([order.start], dtype=np.int64))[0, source])


@lru_cache(maxsize=4)
def _examples_of_steps(order: Order, first: int, count: int) -> list[np.ndarray]:
    """Of some steps together, which takes as long as of one; not to be written to."""
    positions = [order.positions_of(step) for step in range(first, first + count)]
    examples = order.examples_at(np.concatenate(positions))
    examples.flags.writeable = False
    return np.split(examples, np.cumsum([len(part) for part in positions])[:-1])
