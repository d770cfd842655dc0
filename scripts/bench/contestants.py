"""The ways to save a training state that are compared, each as its users call it, all on the same live state.

A contestant is called between two updates and returns when training may go on; where the next update must wait for a copy it
sets `state.copy`. What it returns says, once, how many seconds after the call the last byte was handed over (or synced).
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from training import Training

from finetune.model import adapters
from finetune.store.durable import sync_directory, sync_file
from finetune.store.run import journal
from finetune.training.state import TrainState

Ended = Callable[[], float | None]
Contestant = Callable[[TrainState, Path], Ended]

MEMCPY = "memcpy into warm buffers (the limit)"
RAW = "raw write + fsync beside training"
DCP = "DCP async_save"


def live_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights as a checkpoint stores them, and the optimizer's state, not copied."""
    tensors = {f"weights/{name}": tensor.detach() for name, tensor in adapters.weights(state.model).items()}
    for name, parameter in state.trainable.items():
        tensors |= {f"moments/{name}.{key}": value for key, value in state.optimizer.state[parameter].items()}
    return tensors


def state_bytes(state: TrainState) -> int:
    return sum(tensor.nbytes for tensor in live_tensors(state).values())


def ours(training: Training) -> Contestant:
    """As `finetune.training.run.execute` commits. When a save was durable is what the run's journal says."""

    def save(state: TrainState, directory: Path) -> Ended:
        step = state.step
        training.recorder.commit(state)

        def ended() -> float | None:
            return next((record["save_seconds"] for record in commits(training) if record["step"] == step), None)

        return ended

    return save


def commits(training: Training) -> list[dict]:
    """What the journal says of each commit, the newest first."""
    records = journal.read(training.recorder.path)
    return [record for record in reversed(records) if record.get("event") == "committed"]


def waiting(write: Callable[[TrainState, Path], None]) -> Contestant:
    """A way to save that training waits for."""

    def save(state: TrainState, directory: Path) -> Ended:
        started = time.perf_counter()
        write(state, directory)
        seconds = time.perf_counter() - started
        return lambda: seconds

    return save


def torch_save(state: TrainState, directory: Path) -> None:
    torch.save(live_tensors(state), directory / "state.pt")


def safetensors_save(state: TrainState, directory: Path) -> None:
    from safetensors.torch import save_file

    save_file(live_tensors(state), directory / "state.safetensors")
    sync_file(directory / "state.safetensors")
    sync_directory(directory)


def accelerate_save(state: TrainState, directory: Path) -> None:
    state.accelerator.save_state(str(directory))


def dcp_async(has_cached_stager: bool, is_staged_beside: bool = False) -> Contestant:
    """`torch.distributed.checkpoint.async_save` with its writer as a thread. Staged beside: the copy overlaps, the update waits for it."""
    from torch.distributed.checkpoint import async_save
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=is_staged_beside,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options) if has_cached_stager else None

    def save(state: TrainState, directory: Path) -> Ended:
        started = time.perf_counter()
        answer = async_save(live_tensors(state), checkpoint_id=directory, async_stager=stager, no_dist=True)
        if is_staged_beside:
            state.copy = Gate(answer.staging_completion)
        uploaded = answer.upload_completion if is_staged_beside else answer
        return _seconds_until(uploaded, started)

    return save


class Gate:
    """Holds the next update until a future is done; `TrainState.await_snapshot` asks it."""

    def __init__(self, copied: Future):
        self._copied = copied

    def wait(self) -> float:
        started = time.perf_counter()
        self._copied.result()
        return time.perf_counter() - started


class WarmBuffers:
    """Buffers that are made once; fresh memory is ten times slower to write to."""

    def __init__(self) -> None:
        self.buffers: dict[str, np.ndarray] = {}

    def copy(self, live: dict[str, torch.Tensor]) -> None:
        for name, tensor in live.items():
            source = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            if name not in self.buffers:
                self.buffers[name] = np.empty_like(source)
            np.copyto(self.buffers[name], source)


def memcpy() -> Contestant:
    warm = WarmBuffers()
    return waiting(lambda state, directory: warm.copy(live_tensors(state)))


def copied_beside(write: Callable[[WarmBuffers, Path], None]) -> Contestant:
    """What any background save comes down to: a copy that only the next update waits for, then `write`, on a thread."""
    warm, thread = WarmBuffers(), ThreadPoolExecutor(max_workers=1)

    def save(state: TrainState, directory: Path) -> Ended:
        started = time.perf_counter()
        state.copy = Gate(thread.submit(warm.copy, live_tensors(state)))
        return _seconds_until(thread.submit(write, warm, directory), started)

    return save


def raw_write(warm: WarmBuffers, directory: Path) -> None:
    """The bytes, one file, one fsync; no hashing, no manifest, no rename, nothing read back."""
    with open(directory / "state.raw", "wb", buffering=0) as file:
        for buffer in warm.buffers.values():
            view = memoryview(buffer)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def all_contestants(training: Training) -> dict[str, Contestant]:
    return {
        "finetune": ours(training),
        MEMCPY: memcpy(),
        "torch.save": waiting(torch_save),
        "safetensors + fsync": waiting(safetensors_save),
        "accelerate save_state": waiting(accelerate_save),
        DCP: dcp_async(has_cached_stager=False),
        f"{DCP}, cached stager": dcp_async(has_cached_stager=True),
        f"{DCP}, cached stager, staged beside": dcp_async(has_cached_stager=True, is_staged_beside=True),
    }


NOTES = {
    "finetune": "synced, named by a synced rename",
    MEMCPY: "nothing is on the disk",
    "torch.save": "not synced: a power cut may lose it",
    "safetensors + fsync": "synced",
    "accelerate save_state": "not synced: a power cut may lose it",
    DCP: "files synced, their names not",
    RAW: "synced",
}


def _seconds_until(future: Future, started: float) -> Ended:
    seconds: list[float] = []
    future.add_done_callback(lambda _: seconds.append(time.perf_counter() - started))

    def ended() -> float | None:
        if future.done():
            future.result()  # raises what went wrong
        return seconds[0] if seconds else None

    return ended
