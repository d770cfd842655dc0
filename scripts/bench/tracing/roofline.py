"""What kernels cost on an H100, in a model: the time of their arithmetic or of their bytes, whichever is longer. Nothing is measured."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import torch
from tracing import fake_step

FLOPS = {torch.bfloat16: 798e12, torch.float16: 798e12, torch.float32: 50e12}
"""An H100's arithmetic a second, dense, as its clock allows; fp32 without TF32, as `exact` has it."""
BYTES = 3.0e12
"""A second, of its memory."""
PRODUCTS, ATTENTION, ATTENTION_BACKWARD, MOVED = 0.8, 0.45, 0.3, 0.85
"""The parts of these that good kernels reach."""
LEAST_SECONDS = 2e-6
"""Of a kernel, however small."""
KINDS = ("GEMM", "attention", "elementwise")
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_", "detach")
"""They start no kernel; views do not either."""
WRITTEN_ONLY = ("copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_")
"""They do not read what they write."""
GATHERS = ("embedding", "index_select", "index", "gather")
"""They read of their first tensor as much as they return."""
SCATTERS = ("index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_")
"""They read and write of their first tensor as much as their last has."""


class Kernel(NamedTuple):
    kind: str
    name: str
    """With the types and shapes of its tensors."""
    bytes: int
    flops: int
    seconds: float


class Meter(fake_step.Kernels):
    """The kernels on the device since `begin`, and the most bytes of tensors that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        """The name under which kernels are counted."""
        self.kernels: Counter[tuple[str, Kernel]] = Counter()
        self.live_bytes = self.peak_bytes = 0
        self._known: WeakSet[torch.UntypedStorage] = WeakSet()

    def begin(self, phase: str) -> None:
        self.phase, self.peak_bytes = phase, self.live_bytes
        self.kernels.clear()

    def saw(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        made = [tensor for tensor in fake_step.tensors_of(result) if tensor.device.type == "cuda"]
        for tensor in made:
            self._lives(tensor)
        if made or any(tensor.device.type == "cuda" for tensor in fake_step.tensors_of((args, kwargs))):
            kernel = cost(operation, args, kwargs, result)
            if kernel is not None:
                self.kernels[self.phase, kernel] += 1

    def _lives(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        finalize(storage, self._dies, size)

    def _dies(self, size: int) -> None:
        self.live_bytes -= size

    def seconds(self, phase: str, kind: str | None = None) -> float:
        return sum(
            count * kernel.seconds
            for (named, kernel), count in self.kernels.items()
            if named == phase and kind in (None, kernel.kind)
        )

    def largest(self, phase: str) -> list[tuple[Kernel, int]]:
        """The kernels that take longest together, and how often each runs."""
        found = [(kernel, count) for (named, kernel), count in self.kernels.items() if named == phase]
        return sorted(found, key=lambda each: -each[0].seconds * each[1])


def cost(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Kernel | None:
    """None where no kernel runs."""
    name = operation._schema.name.rpartition("::")[2]
    if operation.is_view or operation.namespace == "prim" or name in FREE:
        return None
    given = fake_step.tensors_of((args, kwargs))
    size = _bytes(operation, name, args, kwargs, result)
    flops, kind, rate = _arithmetic(name, args, given)
    seconds = max(LEAST_SECONDS, size / (MOVED * BYTES), flops / rate)
    return Kernel(kind, f"{name} {' '.join(map(_told, given))}", size, flops, seconds)


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"


def _bytes(operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """All that is read, once, and all that is written."""
    schema = operation._schema.arguments
    pairs = [*zip(schema, args, strict=False), *((each, kwargs.get(each.name)) for each in schema[len(args) :])]
    read = written = 0
    for place, (argument, value) in enumerate(pairs):
        tensors = fake_step.tensors_of(value)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if place == 0 and name in (*GATHERS, *SCATTERS):
            tensors = fake_step.tensors_of(result if name in GATHERS else (args, kwargs))[-1:]
        size = sum(map(_size, tensors))
        written += size * is_written
        read += size * (not is_written or name not in WRITTEN_ONLY)
    returns = operation._schema.returns
    if not any(each.alias_info is not None for each in returns):
        written += sum(map(_size, fake_step.tensors_of(result)))
    return read + written


def _size(tensor: torch.Tensor) -> int:
    """Bytes of the numbers that are there: a broadcast one is read once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def _arithmetic(name: str, args: tuple[Any, ...], given: Sequence[torch.Tensor]) -> tuple[int, str, float]:
    """Operations, the kind, and how many a second."""
    if name.rstrip("_") in MATRIX_PRODUCTS:
        left, right = [tensor for tensor in fake_step.tensors_of(args) if tensor.ndim >= 2][-2:]
        return 2 * left.numel() * right.shape[-1], "GEMM", PRODUCTS * FLOPS[left.dtype]
    if "attn" in name or "attention" in name:
        # (tokens, heads, size), and the length of the longest row: all are taken to be as long; half of the scores are masked
        query, longest = given[0], next(value for value in args if isinstance(value, int))
        forward = 2 * query.numel() * longest
        is_forward = "backward" not in name
        share = ATTENTION if is_forward else ATTENTION_BACKWARD
        return (forward if is_forward else forward * 5 // 2), "attention", share * FLOPS[query.dtype]
    return 0, "elementwise", 1.0
