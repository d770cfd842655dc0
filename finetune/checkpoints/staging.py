"""Floor 1. Copies of live tensors that training does not wait for: warm, reused buffers, filled while forward and backward run.

Parameters and moments do not change between an update and the next one, so a copy has that long; `state.await_snapshot`
holds only the update itself. `saver` takes a copy for each save and gives it back once it is on the disk.
"""

import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch


class Copy:
    """The tensors of one moment, complete after `wait`."""

    def __init__(self, staging: "Staging", buffers: dict[str, torch.Tensor]):
        self.tensors = buffers
        self.awaited_seconds = 0.0
        """How long an update waited for it."""
        self._staging = staging
        self._filling: Future[None] | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def begin(self, copier: Executor, live: dict[str, torch.Tensor], event: torch.Event | None) -> None:
        self._filling = copier.submit(self._fill, live, event)

    def wait(self) -> float:
        """Returns when all is copied, and the live tensors may change; the seconds it took."""
        started = time.perf_counter()
        self._filling.result()
        return time.perf_counter() - started

    def release(self) -> None:
        """Gives the buffers back; the tensors are no longer valid."""
        self._staging.give_back(self.tensors)

    def release_when_done(self) -> None:
        self._filling.add_done_callback(lambda _: self.release())

    def _fill(self, live: dict[str, torch.Tensor], event: torch.Event | None) -> None:
        if event is not None:
            event.synchronize()
        for name, tensor in live.items():
            if tensor.device.type == "cpu":
                # numpy, not copy_: one thread that leaves the others to the forward
                np.copyto(_bytes(self.tensors[name]), _bytes(tensor))


class Staging:
    """Sets of buffers, one for each save under way, made when needed and kept: fresh memory is ten times slower to write to than warm."""

    def __init__(self) -> None:
        self._free: list[dict[str, torch.Tensor]] = []
        self._copier = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="copier"
        )  # starting a thread costs milliseconds

    def take(self, live: dict[str, torch.Tensor]) -> Copy:
        """Begins to copy, and returns at once."""
        copy = Copy(self, self._buffers(live))
        copy.begin(self._copier, live, _queue_on_device(live, copy.tensors))
        return copy

    def give_back(self, buffers: dict[str, torch.Tensor]) -> None:
        self._free.append(buffers)

    def _buffers(self, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        buffers = self._free.pop() if self._free else {}
        for name, tensor in live.items():
            if name not in buffers:
                buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
        return buffers


def _queue_on_device(live: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Event | None:
    """Tensors of a GPU are copied by it, on a stream beside the one that computes. Never run on a GPU."""
    on_device = {name: tensor for name, tensor in live.items() if tensor.device.type != "cpu"}
    if not on_device:
        return None
    stream = torch.Stream(next(iter(on_device.values())).device)
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        for name, tensor in on_device.items():
            buffers[name].copy_(tensor.detach(), non_blocking=True)
    return stream.record_event()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
