"""How a format stores a weight in files: the tensor with its codes, those beside it, and the number that a code stands for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

Parts = Mapping[str, torch.Tensor]
"""The tensors of one weight by the ends of their names; on the meta device where only shapes are asked for."""


class Unreadable(ValueError):
    """The tensors of a weight do not fit together, or hold no numbers."""


class Block(NamedTuple):
    """The part of a weight that shares a scale; None is the whole side."""

    rows: int | None
    columns: int | None

    def grid(self, shape: torch.Size) -> tuple[int, int]:
        """Scales down and across a weight (…, rows, columns); blocks at its edges may be cut."""
        rows, columns = shape[-2:]
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


@dataclass(frozen=True)
class Layout:
    main: str
    """The end of the name of the tensor with the codes."""
    types: tuple[str, ...]
    """Its possible types, in safetensors' spelling."""
    needed: tuple[str, ...]
    """Ends of the names of tensors beside it, after what comes before `main`."""
    decode: Callable[[Parts], torch.Tensor]
    """To the weight in fp32."""
    optional: tuple[str, ...] = ()
    weight: str = ""
    """The end of the weight's name in place of `main`."""
    has_shape: bool = True
    """Whether shapes of the tensors give the weight's, without their values."""


def product(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes times scales, both fp32. A scale of zero would silently remove weights that are not zero."""
    weight = finite(codes * scales)
    if not weight.is_meta and bool(((weight == 0) & (codes != 0)).any()):
        raise Unreadable("a scale is zero under weights that are not")
    return weight


def finite(weight: torch.Tensor) -> torch.Tensor:
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise Unreadable("a weight is NaN or infinite")
    return weight


def spread(scales: torch.Tensor, shape: torch.Size, blocks: tuple[Block, ...]) -> torch.Tensor:
    """Scales (…, rows of blocks, columns of blocks) for each element of a weight (…, rows, columns), in fp32."""
    if len(shape) < 2:
        raise Unreadable(f"a weight of the shape {list(shape)} has no rows and columns")
    block = _fitting(scales, shape, blocks)
    if scales.numel() == 1:
        return scales.float().reshape(1, 1)
    found = scales.float().reshape(*shape[:-2], *block.grid(shape))
    if block.rows:
        found = found.repeat_interleave(block.rows, -2)[..., : shape[-2], :]
    if block.columns:
        found = found.repeat_interleave(block.columns, -1)[..., : shape[-1]]
    return found


def _fitting(scales: torch.Tensor, shape: torch.Size, blocks: tuple[Block, ...]) -> Block:
    """The one of `blocks` whose scales have this shape."""
    fitting = {}
    for block in blocks:
        grid = block.grid(shape)
        flat = [grid[0]] if grid[1] == 1 else []
        shapes = [[*shape[:-2], *grid], [*shape[:-2], *flat]] + ([[], [1], [1, 1]] if grid == (1, 1) else [])
        if list(scales.shape) in shapes:
            # equal where they reach to the same edges
            fitting[(min(block.rows or shape[-2], shape[-2]), min(block.columns or shape[-1], shape[-1]))] = block
    if len(fitting) != 1:
        wanted = " or ".join(str(list(block.grid(shape))) for block in blocks)
        raise Unreadable(
            f"scales of the shape {list(scales.shape)} do not fit a weight of {list(shape)}: {wanted} would"
        )
    return next(iter(fitting.values()))
