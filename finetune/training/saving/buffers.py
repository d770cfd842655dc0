"""Copies of live tensors that training does not wait for: warm, reused buffers, filled while forward and backward run.

Parameters and moments do not change between an update and the next one, so a copy has that long; `state.await_snapshot`
holds only the update itself. `saver` takes a copy for each save and gives it back once it is on the disk.
"""

import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch

from finetune.errors import CheckpointError

SLAB_BYTES = 2**30  # of page-locked memory at once; a larger tensor has its own slab
ALIGNMENT = 64  # bytes
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class Copy:
    """The tensors of one moment, complete after `wait`."""

    def __init__(self, staging: "Staging", live: dict[str, torch.Tensor]):
        self.tensors: dict[str, torch.Tensor] = {}
        self.bytes = sum(tensor.nbytes for tensor in live.values())
        self.awaited_seconds = 0.0
        """How long an update waited for it."""
        self._staging = staging
        self._filling: Future[None] | None = None

    def begin(self, copier: Executor, live: dict[str, torch.Tensor]) -> None:
        self._filling = copier.submit(self._fill, live, _moment(live))

    def wait(self) -> float:
        """Returns when all is copied, and the live tensors may change; the seconds it took."""
        started = time.perf_counter()
        if self._filling:
            self._filling.result()
        return time.perf_counter() - started

    def release(self) -> None:
        """Gives the buffers back; the tensors are no longer valid."""
        self._staging.give_back(self.tensors)

    def release_when_done(self) -> None:
        if self._filling:
            self._filling.add_done_callback(lambda _: self.release())

    def _fill(self, live: dict[str, torch.Tensor], moment: torch.Event | None) -> None:
        self.tensors = self._staging.buffers(live)
        done = _queue_on_device(live, self.tensors, moment) if moment else None
        for name, tensor in live.items():
            if tensor.device.type == "cpu":
                # numpy, not copy_: one thread that leaves the others to the forward
                np.copyto(_bytes(self.tensors[name]), _bytes(tensor))
        if done:
            done.synchronize()


class Staging:
    """Sets of buffers, one for each save under way, made when needed and kept: fresh memory is ten times slower to write to than warm."""

    def __init__(self) -> None:
        self._free: list[dict[str, torch.Tensor]] = []
        # Kept, because starting a thread costs milliseconds.
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copier")

    def take(self, live: dict[str, torch.Tensor]) -> Copy:
        """Begins to copy, and returns at once."""
        copy = Copy(self, live)
        copy.begin(self._copier, live)
        return copy

    def make_ahead(self, live: dict[str, torch.Tensor]) -> None:
        """Makes one more set beside the training. To page-lock memory takes seconds, for which a save that makes it would hold an update.
        Where that fails, the save that misses the set says why."""
        self._copier.submit(lambda: self.give_back(_made(live)))

    def give_back(self, buffers: dict[str, torch.Tensor]) -> None:
        if buffers:
            # Threads share the list: the writer's gives back, the copier's takes. Both calls are atomic.
            self._free.append(buffers)

    def buffers(self, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A set with room for these tensors."""
        found = self._free.pop() if self._free else {}
        return found | _made({name: tensor for name, tensor in live.items() if name not in found})


def _made(live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Buffers for tensors, none of them larger than it has to be."""
    buffers = {}
    on_device = {name: tensor for name, tensor in live.items() if tensor.device.type != "cpu"}
    for name, tensor in live.items():
        if name not in on_device:
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    for members in _slabs(on_device):
        slab, start = _page_locked(sum(_aligned(tensor) for tensor in members.values())), 0
        for name, tensor in members.items():
            buffers[name] = slab[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _aligned(tensor)
    return buffers


def _slabs(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups that fit a slab, in their order."""
    members: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if members and size + _aligned(tensor) > SLAB_BYTES:
            yield members
            members, size = {}, 0
        members[name] = tensor
        size += _aligned(tensor)
    if members:
        yield members


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _page_locked(size: int) -> torch.Tensor:
    """Page-locked bytes of the host, for a GPU's copies. torch would round the size up to a power of two. Never run on a GPU."""
    memory, runtime = np.empty(size, dtype=np.uint8), torch.cuda.cudart()
    address = memory.ctypes.data
    if error := int(runtime.cudaHostRegister(address, size, PORTABLE)):
        message = f"the host cannot page-lock {size:,} bytes for a copy of the state (CUDA error {error})"
        raise CheckpointError(message, hint="free memory of the host, or train an adapter")
    # before the memory is freed; at the end of the process CUDA may be gone first, and lets go by itself
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory)


def _moment(live: dict[str, torch.Tensor]) -> torch.Event | None:
    """What the device has been asked to do up to now; None where no tensor is on one."""
    device = next((tensor.device for tensor in live.values() if tensor.device.type != "cpu"), None)
    return None if device is None else torch.accelerator.current_stream(device).record_event()


def _queue_on_device(
    live: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], moment: torch.Event
) -> torch.Event:
    """Tensors of a GPU are copied by it, on a stream beside the one that computes. Never run on a GPU."""
    on_device = {name: tensor for name, tensor in live.items() if tensor.device.type != "cpu"}
    stream = torch.Stream(next(iter(on_device.values())).device)
    stream.wait_event(moment)
    with stream:
        for name, tensor in on_device.items():
            buffers[name].copy_(tensor.detach(), non_blocking=True)
    return stream.record_event()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    # As bytes, because numpy has no bfloat16.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
