"""What it takes to go on: verify a checkpoint's every byte, load it into model and optimizer, find the place in the data."""

import time
from collections.abc import Callable

import numpy as np
import torch
from contestants import live_tensors, state_bytes
from figures import OURS, Goal, Part, Quantity
from safetensors.torch import load_file
from training import Training

from finetune.plan.row_order import Order
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.training.saving import reading

POSITION = 10**9


def resumed(training: Training, rounds: int) -> Part:
    """A checkpoint of this state, written here, its files warm; and the order's seek."""
    training.recorder.commit(training.state)
    training.settle()
    foreign = training.recorder.path.parent / "state.pt"
    torch.save(live_tensors(training.state), foreign)
    store = Store(training.recorder.path)
    checkpoint, _ = store.newest_sound()
    resume = Quantity(f"to resume from {state_bytes(training.state):,} bytes: verify and load", "s")
    pieces: dict[str, Callable[[], object]] = {
        f"  {OURS}: every byte verified (Store.newest_sound)": store.newest_sound,
        f"  {OURS}: files to model and optimizer (reading.read)": lambda: reading.read(
            training.state, training.plan, checkpoint
        ),
        "    of these load_file alone": lambda: [load_file(path) for path in checkpoint.path.glob("*.safetensors")],
        "torch.load, nothing verified or restored": lambda: torch.load(foreign, weights_only=True),
    }
    for _ in range(rounds):
        seconds = [_seconds(piece) for piece in pieces.values()]
        resume.add(OURS, seconds[0] + seconds[1])
        for name, taken in zip(pieces, seconds, strict=True):
            resume.add(name, taken)
    speed, seek = _verify_speed(checkpoint, rounds), _seek(50 * rounds)
    goals = [
        Goal("resume: verify and load the full state", resume.median(), 0.4, "s"),
        Goal("verify, warm file, one core", speed.median(), 3.0, "GB/s", is_floor=True),
        Goal("seek to position 10^9 of the order", seek.median(), 0.001, "ms"),
    ]
    foreign.unlink()
    return Part([resume, speed, seek], goals)


def _verify_speed(checkpoint: Checkpoint, rounds: int) -> Quantity:
    speed = Quantity("verify, warm files, one thread", "GB/s")
    size = sum(record.bytes for record in checkpoint.manifest.files.values())
    for _ in range(rounds):
        speed.add(OURS, size / 1e9 / _seconds(lambda: verify(checkpoint.path)))
    return speed


def _seek(count: int) -> Quantity:
    """The rows of an update of 32 at that position, once in an epoch longer than that and once in one of many."""
    seek = Quantity("the 32 rows from position 10^9 of the order", "ms")
    positions = np.arange(POSITION, POSITION + 32, dtype=np.int64)
    orders = {OURS: Order(0, 32, (2 * POSITION,)), f"{OURS}, epoch 999 of 1,000,003 rows": Order(0, 32, (1_000_003,))}
    for name, order in orders.items():
        for _ in range(count):
            seek.add(name, _seconds(lambda order=order: order.examples_at(positions)))
    return seek


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
