"""Which source a position of the order is of: integers alone, so that shares are exact and any position costs the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

from finetune.errors import DataError
from finetune.recipe.schema import Data

MILLIONTHS = 10**6
DIGITS = Context(
    prec=40
)  # of decimal, whose exp and ln are rounded correctly: equal on every machine, which a float's are not


@dataclass(frozen=True)
class Stretch:
    """A part of an epoch in which the shares of the sources stay the same."""

    length: int
    """In examples."""
    shares: tuple[int, ...]
    """Of each source, in proportion to each other."""


def drawn(shares: Sequence[int], positions: np.ndarray, *, is_even: bool) -> np.ndarray:
    """How many of the first p positions each source has (int64, shape (n, sources)), for each p of `positions` (int64, shape (n,)).

    A source with share a of what others left over, A, has r of p positions: p a / A, rounded. Each count grows by 0 or 1 a position,
    and where p is a multiple of all shares together every count is exact. Older plans take the sources as listed and round down.
    `is_even` takes the largest share first and rounds to the nearest. Then a source is at most 1 away from its share of p positions
    with three sources, at most 2 with twelve, and (1 + H(k)) / 2 with k + 2, where H is the harmonic number.
    """
    divisor = gcd(*shares)
    reduced = [share // divisor for share in shares]
    remaining = sum(reduced)
    longest = 2 * (int(positions.max(initial=0)) + 1) * remaining
    rest = positions if longest < 2**63 else positions.astype(object)  # Python's integers: a product can pass 64 bits
    counts = np.zeros((len(positions), len(reduced)), dtype=np.int64)
    listed = range(len(reduced))
    for source in sorted(listed, key=lambda source: -reduced[source]) if is_even else listed:
        if share := reduced[source]:
            count = (2 * rest * share + remaining) // (2 * remaining) if is_even else rest * share // remaining
            counts[:, source] = count
            rest, remaining = rest - count, remaining - share
    return counts


def drawn_in(stretches: Sequence[Stretch], positions: np.ndarray) -> np.ndarray:
    """The same where an epoch consists of stretches; of several, each epoch begins with the first one."""
    if len(stretches) == 1:  # not by the epoch: its roundings would add up
        return drawn(stretches[0].shares, positions, is_even=True)
    epochs, within = np.divmod(positions, sum(stretch.length for stretch in stretches))
    counts, first = np.zeros((len(positions), len(stretches[0].shares)), dtype=np.int64), 0
    for stretch in stretches:
        inside = np.append(np.clip(within - first, 0, stretch.length), stretch.length)
        *_, whole = found = drawn(stretch.shares, inside, is_even=True)
        counts += found[:-1] + epochs[:, None] * whole
        first += stretch.length
    return counts


def stretches_of(data: Data, sizes: Sequence[int]) -> tuple[Stretch, ...]:
    """The stretches of an epoch over sources of these sizes; none where the recipe asks for the order of older plans.

    DataError where an epoch would draw nothing of a source.
    """
    stages = [source.stage_weights for source in data.train]
    if data.order == "curriculum" and all(stages):
        return _staged(stages, sum(sizes))
    amounts = _amounts(data, sizes)
    weights = [source.weight for source in data.train if isinstance(source.weight, float)]
    shares = integers(weights) if weights else tempered(tuple(sizes), data.temperature)
    is_mixed = bool(weights) or data.temperature != 1
    if data.order == "curriculum" or (data.order == "sequential" and not is_mixed):
        return tuple(Stretch(amount, _alone(number, len(sizes))) for number, amount in enumerate(amounts))
    if data.order == "sequential" or data.temperature != 1:
        return (Stretch(sum(sizes), shares),)
    return (Stretch(sum(amounts), amounts),) if any(source.epochs for source in data.train) else ()


def _amounts(data: Data, sizes: Sequence[int]) -> tuple[int, ...]:
    """Examples of each source in an epoch: all, or `epochs` times as many, halves to the even number."""
    amounts = tuple(
        round(Fraction(str(source.epochs)) * size) if source.epochs else size
        for source, size in zip(data.train, sizes, strict=True)
    )
    for number, (source, amount) in enumerate(zip(data.train, amounts, strict=True)):
        if not amount:
            message = f"data.train[{number}].epochs: {source.epochs:g} draws none of {sizes[number]} examples"
            raise DataError(message, where=source.place, hint="raise `epochs`, or remove the source")
    return amounts


def _staged(stages: Sequence[Sequence[float]], total: int) -> tuple[Stretch, ...]:
    """As many stages as a source has weights, of the same length."""
    count = len(stages[0])
    edges = [total * stage // count for stage in range(count + 1)]
    shares = [integers([weights[stage] for weights in stages]) for stage in range(count)]
    return tuple(Stretch(end - start, each) for start, end, each in zip(edges, edges[1:], shares, strict=False))


def _alone(number: int, count: int) -> tuple[int, ...]:
    return tuple(int(source == number) for source in range(count))


def integers(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as they are written, as integers in the same proportion."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * scale) for fraction in fractions)


@lru_cache(maxsize=64)
def tempered(sizes: tuple[int, ...], temperature: float) -> tuple[int, ...]:
    """Shares proportional to size^(1/temperature), in millionths of the largest; the same integers on every machine."""
    largest, divisor = DIGITS.ln(Decimal(max(sizes))), Decimal(str(temperature))
    logarithms = [DIGITS.divide(DIGITS.subtract(DIGITS.ln(Decimal(size)), largest), divisor) for size in sizes]
    return tuple(max(1, int((DIGITS.exp(each) * MILLIONTHS).to_integral_value())) for each in logarithms)
