"""Floor 1. Copies of live tensors that training does not wait for: warm, reused buffers, filled while forward and backward run.

Parameters and moments do not change between an update and the next one, so a copy has that long; `state.await_snapshot`
holds only the update itself. `recorder` takes a copy for each save and gives it back once it is on the disk.
"""

import queue
import threading
import time

import numpy as np
import torch

SAVES_IN_FLIGHT = 2  # a third one waits: buffers cost as much memory as the state they hold


class Copy:
    """The tensors of one moment, complete after `wait`."""

    def __init__(self, staging: "Staging", buffers: dict[str, torch.Tensor]):
        self.tensors = buffers
        self._staging = staging
        self._is_done = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> float:
        """Returns when the live tensors may change; the seconds it took."""
        started = time.perf_counter()
        self._is_done.wait()
        if self._error is not None:
            raise RuntimeError("the copy of a snapshot failed") from self._error
        return time.perf_counter() - started

    def release(self) -> None:
        """Gives the buffers back; the tensors are no longer valid."""
        self._staging.give_back(self.tensors)

    def _fill(self, live: dict[str, torch.Tensor], event: torch.Event | None) -> None:
        try:
            if event is not None:
                event.synchronize()
            for name, tensor in live.items():
                if tensor.device.type == "cpu":
                    # numpy, not copy_: one thread that leaves the others to the forward
                    np.copyto(_bytes(self.tensors[name]), _bytes(tensor))
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._is_done.set()


class Staging:
    """At most two sets of buffers, made on first use and kept: fresh memory is ten times slower to write to than warm."""

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[dict[str, torch.Tensor]] = queue.SimpleQueue()
        self._made = 0

    def take(self, live: dict[str, torch.Tensor]) -> Copy:
        """Begins to copy; returns at once, unless two copies are still being written."""
        copy = Copy(self, self._buffers(live))
        event = _queue_on_device(live, copy.tensors)
        threading.Thread(target=copy._fill, args=(live, event), daemon=True).start()
        return copy

    def give_back(self, buffers: dict[str, torch.Tensor]) -> None:
        self._free.put(buffers)

    def _buffers(self, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._free.empty() and self._made < SAVES_IN_FLIGHT:
            self._made += 1
            buffers = {}
        else:
            buffers = self._free.get()
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
