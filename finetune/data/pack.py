"""Arranges the examples of one update into micro-batches: a pure function of their lengths.

It must not choose examples, only arrange them, so packing on and off give the same step loss. A micro-batch is a list of
indices into the step; its place in the list is its slot, the same for every world size.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


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
    """Examples of similar length together, as many as fit with all padded to the longest; `budget` is in tokens."""
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


ARRANGEMENTS = {"packed": packed, "padded": padded, "alone": alone}


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # equal ones stay in their order
