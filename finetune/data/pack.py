"""Arranges the examples of one update into micro-batches: a pure function of their lengths.

It must not choose examples, only arrange them, so packing on and off give the same step loss. A micro-batch is a list of
indices into the step; its place in the list is its slot, the same for every world size.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

PADDING_SHARE = 0.1
MICRO_BATCH_COST = 128  # in tokens: reading all weights twice and adding to all gradients takes a device about as long

LEAST_STEP = 64  # tokens between two fixed lengths


def fixed_length(tokens: int) -> int:
    """The next of eight lengths between two powers of two, or the next multiple of 64: so there are few, and beyond 512 tokens at most an
    eighth is filled up."""
    step = max(LEAST_STEP, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: the longest example first, each into the fullest micro-batch that still has room.

    `budget` is in tokens; an example longer than the budget gets its own micro-batch.
    """
    bins: list[list[int]] = []
    # (tokens left, bin), sorted: the first that fits is the fullest, and of equals the oldest.
    rooms: list[tuple[int, int]] = []
    for index in _longest_first(lengths):
        place = bisect_left(rooms, (lengths[index],))
        if place < len(rooms):
            left, number = rooms.pop(place)
            bins[number].append(index)
        else:
            left, number = budget, len(bins)
            bins.append([index])
        insort(rooms, (left - lengths[index], number))
    return bins


def padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Examples of like length together: the fewest micro-batches with at most `PADDING_SHARE` of padding, if those are enough work.

    `budget` is in tokens, with all examples padded to the longest of their micro-batch. A micro-batch more costs a pass over
    all weights, so none is made that saves less than `MICRO_BATCH_COST`.
    """
    order = _longest_first(lengths)
    sizes = np.array([lengths[index] for index in order], dtype=np.int64)
    cost = max(int(sizes.sum()), MICRO_BATCH_COST)
    bounds = _cheapest(sizes, budget, cost)
    while _padding_share(sizes, bounds) > PADDING_SHARE and cost > MICRO_BATCH_COST:
        cost = max(cost // 2, MICRO_BATCH_COST)
        bounds = _cheapest(sizes, budget, cost)
    return [order[start:end] for start, end in pairwise(bounds)]


def _cheapest(sizes: np.ndarray, budget: int, cost: int) -> list[int]:
    """Where to cut sizes, longest first, so that padded tokens and the `cost` of each micro-batch are least together.

    The shortest path from 0 to the end, over all groups within the budget. Of equal ways it takes the longer last group.
    """
    least, starts = np.zeros(len(sizes) + 1, dtype=np.int64), [0] * (len(sizes) + 1)
    first = 0
    for end in range(1, len(sizes) + 1):
        # A group pays for its first size, and sizes fall: what was too much once stays too much.
        while first < end - 1 and (end - first) * sizes[first] > budget:
            first += 1
        costs = least[first:end] + sizes[first:end] * np.arange(end - first, 0, -1) + cost
        best = int(costs.argmin())
        least[end], starts[end] = costs[best], first + best
    bounds = [len(sizes)]
    while bounds[-1]:
        bounds.append(starts[bounds[-1]])
    return bounds[::-1]


def _padding_share(sizes: np.ndarray, bounds: Sequence[int]) -> float:
    """Of all tokens that are computed."""
    computed = sum(int(sizes[start]) * (end - start) for start, end in pairwise(bounds))
    return 1 - int(sizes.sum()) / computed if computed else 0.0


def filled(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Examples of similar length together, as many as fit with all padded to the longest: how older runs were padded."""
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def alone(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each example in its own micro-batch, for models whose figures change in a batch; `budget` is ignored."""
    return [[index] for index in _longest_first(lengths)]


ARRANGEMENTS = {"packed": packed, "padded": padded, "filled": filled, "alone": alone}


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # equal ones stay in their order
