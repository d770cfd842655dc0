"""What one save costs a training: the time it is blocked, the time until the save is there, and the steps that get slower meanwhile.

All contestants save the same live state in one process, in turn, and the same forwards and backwards run between the saves.
"""

import os
import shutil
import time
from statistics import median

from contestants import (
    DCP,
    MEMCPY,
    NOTES,
    RAW,
    Contestant,
    all_contestants,
    commits,
    copied_beside,
    ours,
    raw_write,
    state_bytes,
)
from figures import OURS, Goal, Part, Quantity, rotated
from training import Training

QUIET_STEPS = 2  # before each save, to compare the steps beside it with


def blocked(training: Training, rounds: int) -> Part:
    """All contestants on this state."""
    times = _measure(training, all_contestants(training), rounds)
    bytes_ = state_bytes(training.state)
    goals = [
        Goal(
            f"share of DCP async_save's blocked time, {bytes_:,} bytes",
            times.blocked.median() / times.blocked.median(DCP),
            0.1,
            "",
        )
    ]
    if training.plan.trainable_parameters == training.plan.total_parameters:
        goals.insert(0, Goal("blocked time per save, median, full state", times.blocked.median(), 0.005, "ms"))
    facts = {
        "state bytes": bytes_,
        "first saves, blocked (ms)": {name: round(1e3 * first, 1) for name, first in times.first.items()},
    }
    return Part([times.blocked, times.ended, times.lost], goals, facts)


def durable(training: Training, rounds: int) -> Part:
    """Ours and a bare write of the same bytes, both beside the training, in turn."""
    times = _measure(training, {OURS: ours(training), RAW: copied_beside(raw_write)}, rounds)
    goal = Goal(
        "time until durable, as a multiple of a raw write + fsync",
        times.ended.median() / times.ended.median(RAW),
        1.3,
        "",
    )
    newest = commits(training)[:rounds]
    figures = ("save_seconds", "save_cpu_seconds", "read_back_seconds")
    facts = {f"median of {name} in our journal": median(record[name] for record in newest) for name in figures}
    return Part([times.ended, times.lost], [goal], {"state bytes": state_bytes(training.state)} | facts)


class Times:
    def __init__(self, size: int):
        self.blocked = Quantity(
            f"blocked time per save of {size:,} bytes: the call, and what the next update waits", "ms"
        )
        self.ended = Quantity("from the call until the save is there, beside training", "s")
        self.lost = Quantity(
            "training time lost per save: the call, and how much longer the steps beside it took", "ms"
        )
        self.first: dict[str, float] = {}
        """Blocked seconds of each first save, which makes the buffers; not counted above."""


def _measure(training: Training, contestants: dict[str, Contestant], rounds: int) -> Times:
    times = Times(state_bytes(training.state))
    for turn in range(-1, rounds):
        for name in rotated(list(contestants), turn) if turn >= 0 else contestants:
            _one_save(training, name, contestants[name], times, is_first=turn < 0)
    for quantity in (times.blocked, times.ended, times.lost):
        quantity.samples = {name: quantity.samples[name] for name in contestants if name in quantity.samples}
        quantity.notes = {
            name: next(note for known, note in NOTES.items() if name.startswith(known)) for name in contestants
        }
    return times


def _one_save(training: Training, name: str, save: Contestant, times: Times, is_first: bool) -> None:
    directory = training.recorder.path.parent / "contestant"
    directory.mkdir()
    quiet = min(training.step()[0] for _ in range(QUIET_STEPS))
    started = time.perf_counter()
    ended = save(training.state, directory)
    call = time.perf_counter() - started
    seconds, awaited = training.step()
    lost = call + seconds - quiet
    while (until := ended()) is None:
        lost += training.step()[0] - quiet
    if is_first:
        times.first[name] = call + awaited
    else:
        times.blocked.add(name, call + awaited)
        times.lost.add(name, lost)
        if name != MEMCPY:
            times.ended.add(name, until)
    training.settle()
    shutil.rmtree(directory)
    os.sync()  # what others left to the kernel is not paid by the next one
