"""Gradients summed in the order of a step's slots: the same bits at every number of ranks (`train.reproducibility: elastic`).

One process adds the gradients of its micro-batches one after another. Several ranks make the same sum: after each turn a rank gets its
slice of the gradients of all ranks and adds them by slot, and at the end of the step the slices are put together. A turn sends each
gradient once, so it suits adapters: plain DDP sends them once a step.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


class _Group:
    """The parameters of one type, as one row of numbers in `ranks` equal slices."""

    def __init__(self, members: Sequence[tuple[int, Parameter]], rank: int, ranks: int):
        """`members` with their numbers among all parameters."""
        self.members = list(members)
        sizes = [parameter.numel() for _, parameter in self.members]
        bounds = [0, *accumulate(sizes)]
        width = -(-bounds[-1] // ranks)
        like = self.members[0][1]
        self.whole = torch.zeros(ranks * width, dtype=like.dtype, device=like.device)
        """This rank's gradients while a turn ends, the sums of the step at its end."""
        self._received, self._sums = torch.zeros_like(self.whole), torch.zeros_like(self.whole[:width])
        self._places = list(zip(bounds, bounds[1:], strict=False))
        first = rank * width
        within = [(max(start - first, 0), min(end - first, width)) for start, end in self._places]
        own = [(*member, *place) for member, place in zip(self.members, within, strict=True) if place[0] < place[1]]
        self._own = [number for number, _, _, _ in own]
        """The parameters that have a part in this rank's slice."""
        self._parts = [self._sums[start:end] for _, _, start, end in own]
        self._parts_of = [[row[start:end] for _, _, start, end in own] for row in self._received.view(ranks, width)]

    def views(self) -> list[Tensor]:
        pairs = zip(self.members, self._places, strict=True)
        return [self.whole[start:end].view(parameter.shape) for (_, parameter), (start, end) in pairs]

    def exchange(self, has: Sequence[Sequence[bool]], is_begun: Sequence[bool]) -> None:
        """Adds the gradients of a turn. `has`: which parameters each rank has one for; `is_begun`: which have a sum already."""
        dist.all_to_all_single(self._received.view(torch.uint8), self.whole.view(torch.uint8))  # moves bits of any type
        begun = {number for number in self._own if is_begun[number]}
        for of_rank, parts in zip(has, self._parts_of, strict=True):
            there = [place for place, number in enumerate(self._own) if of_rank[number]]
            # The first is copied: a sum that began with zero would lose the sign of a negative zero.
            first = [place for place in there if self._own[place] not in begun]
            later = [place for place in there if self._own[place] in begun]
            if first:
                torch._foreach_copy_([self._parts[place] for place in first], [parts[place] for place in first])
            if later:
                torch._foreach_add_([self._parts[place] for place in later], [parts[place] for place in later])
            begun.update(self._own[place] for place in first)

    def gather(self) -> None:
        """Puts the slices of all ranks together in `whole`."""
        dist.all_gather_into_tensor(self.whole.view(torch.uint8), self._sums.view(torch.uint8))


class SlotSums:
    """Collective: every rank calls `add` after each of its turns, and `finish` at the end of the step."""

    def __init__(self, parameters: Sequence[Parameter], rank: int, ranks: int):
        self._parameters, self._ranks = list(parameters), ranks
        types = dict.fromkeys(parameter.dtype for parameter in self._parameters)
        of_type = [[each for each in enumerate(self._parameters) if each[1].dtype == dtype] for dtype in types]
        self._groups = [_Group(members, rank, ranks) for members in of_type]
        self._is_begun = [False] * len(self._parameters)

    def add(self, is_idle: bool) -> None:
        """Takes the gradients of this rank's turn, and leaves none behind. A rank without a slot has nothing to add."""
        own = [not is_idle and parameter.grad is not None for parameter in self._parameters]
        device = self._parameters[0].device
        flags = torch.zeros(self._ranks * len(own), dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(flags, torch.tensor(own, dtype=torch.uint8, device=device))
        has = [[bool(flag) for flag in row] for row in flags.view(self._ranks, -1).tolist()]
        for group in self._groups:
            for (number, parameter), view in zip(group.members, group.views(), strict=True):
                if own[number] and parameter.grad is not None:
                    view.copy_(parameter.grad)
            group.exchange(has, self._is_begun)
        self._is_begun = [begun or any(row[number] for row in has) for number, begun in enumerate(self._is_begun)]
        for parameter in self._parameters:
            parameter.grad = None

    def finish(self) -> None:
        """Gives each parameter its sum, or no gradient if no slot had one."""
        for group in self._groups:
            group.gather()
            for (number, parameter), view in zip(group.members, group.views(), strict=True):
                # A copy: kernels may add up memory that is aligned otherwise in another order.
                parameter.grad = view.clone() if self._is_begun[number] else None
        self._is_begun = [False] * len(self._parameters)
