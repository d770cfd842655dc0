"""What a rank holds of a tensor whose rows are spread over ranks (DTensor, sharded by its first dimension). A plain tensor is whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Module


class Rows(NamedTuple):
    """The rows of a tensor that this rank holds, from `first` up to `end`, and the shape of the whole."""

    first: int
    end: int
    shape: tuple[int, ...]

    @property
    def first_number(self) -> int:
        """The place of the first number of these rows in the whole tensor."""
        return self.first * prod(self.shape[1:])


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> Rows | None:
    """None for a tensor that every rank has whole."""
    if not isinstance(tensor, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    # A rank beyond the last row holds none; torch gives it an offset of the tensor's length.
    return Rows(offset[0], offset[0] + shape[0], tuple(tensor.shape))


def is_spread(tensors: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


class Share(NamedTuple):
    """Which of the equal shares of a tensor's rows a process holds."""

    number: int
    of_shares: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor, in the same memory; the last shares may have fewer or none."""
        if not tensor.ndim or self.of_shares == 1:
            return tensor
        size = -(-len(tensor) // self.of_shares)
        return tensor[self.number * size : (self.number + 1) * size]


WHOLE = Share(0, 1)


def share_of(tensor: Tensor) -> Share:
    """Of a tensor that is spread over ranks by its rows; `WHOLE` for one that is not."""
    if not isinstance(tensor, DTensor):
        return WHOLE
    over = next(dimension for dimension, each in enumerate(tensor.placements) if each.is_shard())
    return Share(tensor.device_mesh.get_local_rank(over), tensor.device_mesh.size(over))


def sharing(tensor: Tensor) -> ProcessGroup | None:
    """The ranks that together hold each row of a tensor once; None stands for all."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1) if isinstance(tensor, DTensor) else None


def is_copy(tensor: Tensor) -> bool:
    """Whether the rows that this rank holds of a tensor are another rank's to save."""
    if not isinstance(tensor, DTensor):
        return False
    pairs = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    return any(place > 0 for placement, place in pairs if placement.is_replicate())


def placed(part: Tensor, like: Tensor) -> Tensor:
    """What a rank holds of a tensor, as the tensor: spread as one `like` it, and on its device unless that has no memory."""
    part = part if like.is_meta else part.to(like.device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@contextmanager
def whole(layer: Module) -> Iterator[None]:
    """Every rank has all weights of a layer meanwhile, where FSDP spreads them; all ranks enter together."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()
