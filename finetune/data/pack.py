"""Floor 1. How the examples of one update are arranged into micro-batches: a pure function of their lengths.

Order alone chooses the examples of a step; this only arranges them, so packing on and off give the same step loss.
A micro-batch is a list of indices into the step; its place in the list is its slot, the same for every world size.
"""

from collections.abc import Sequence


def packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: the longest example first, each into the fullest micro-batch that still has room.

    `budget` is in tokens; an example longer than the budget gets a micro-batch of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        fitting = [number for number, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            number = min(fitting, key=lambda fit: (room[fit], fit))
            bins[number].append(index)
            room[number] -= lengths[index]
        else:
            bins.append([index])
            room.append(budget - lengths[index])
    return bins


def padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Examples of like length together, as many as fit when all are padded to the longest; `budget` in tokens."""
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
