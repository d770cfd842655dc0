"""What a rank holds of a tensor whose rows are spread over ranks (DTensor, sharded by its first dimension). A plain tensor is whole."""

from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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


def placed(part: Tensor, like: Tensor) -> Tensor:
    """What a rank holds of a tensor, as the tensor: on the device of one `like` it, and spread in the same way."""
    part = part.to(like.device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
