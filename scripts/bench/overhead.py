"""How much longer a training takes when it saves: blocks of steps with and without, alternating, on the same rows.

The effect of a save ends with its step or soon after. So a block is short, its extra time is measured against the quiet blocks
around it, and is then spread over the steps between two saves; a save that outlives its block is counted and said.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from contestants import Contestant, Ended, commits, copied_beside, ours, state_bytes
from figures import OURS, Goal, Part, Quantity, rotated
from training import Training

TOKENS = 4000  # of an update of the work that the goals name
QUIET, AGAIN, PROCESS = "quiet", "quiet, the second (noise)", "writer process (floor)"


class WriterProcess:
    """`writer_process.py`, told over a pipe. Training copies its state as ours does; the process has a buffer of the same size."""

    def __init__(self, directory: Path, size: int):
        self._directory = directory
        directory.mkdir()
        script = Path(__file__).with_name("writer_process.py")
        self._process = subprocess.Popen(
            [sys.executable, script, directory, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hash_cpu_seconds = self._answer()["hash_cpu_seconds"]
        self.cpu_seconds: list[float] = []

    def write(self, *_: object) -> None:
        self._process.stdin.write("write\n")
        self._process.stdin.flush()
        self.cpu_seconds.append(self._answer()["cpu_seconds"])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._directory)

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the writer process ended with {self._process.wait()}")
        return json.loads(line)


@contextmanager
def writer_process(training: Training) -> Iterator[WriterProcess]:
    process = WriterProcess(training.recorder.path.parent / "process", state_bytes(training.state))
    try:
        yield process
    finally:
        process.close()


def every_ten(training: Training, cycles: int, block: int, threads: int) -> Part:
    """A full state, saved at every tenth step of 4,000 tokens, or as seldom; beside ours a process that writes the same bytes."""
    torch.set_num_threads(threads)
    with writer_process(training) as process:
        blocks = Blocks(training, {OURS: ours(training), PROCESS: copied_beside(process.write)}, block)
        blocks.run(cycles)
        cadence = max(1, round(10 * TOKENS / training.plan.counts.tokens))  # an epoch is one update here
        share = blocks.share(cadence)
        cores = "a core is free" if threads == 1 else "no core is free"
        cpu = Quantity(
            "CPU seconds of one save: all it added to this process, of it the writer's thread, the writer process", "s"
        )
        cpu.samples = {
            OURS: blocks.extra_cpu[OURS],
            f"{OURS}, its writer's thread": [record["save_cpu_seconds"] for record in commits(training)[:cycles]],
            PROCESS: process.cpu_seconds[1:],
        }
        facts = blocks.facts() | {
            "CPU seconds to hash the state, nothing written": round(process.hash_cpu_seconds, 3),
            "the floor, were that CPU time taken from training (%)": round(
                100 * cpu.median(PROCESS) / (cadence * blocks.step_seconds * threads), 2
            ),
        }
    limit = 0.01 if threads == 1 else 0.025
    goal = Goal(
        f"overhead of a save every 40,000 tokens, {threads} torch threads ({cores})", share.median(), limit, "%"
    )
    return Part([share, blocks.extra_seconds(), cpu], [goal], facts)


def every_step(training: Training, cycles: int, block: int, threads: int) -> Part:
    """A small state, saved at each step; its time is spread over an update of 4,000 tokens."""
    torch.set_num_threads(threads)
    blocks = Blocks(training, {OURS: ours(training)}, block, is_at_each_step=True)
    blocks.run(cycles)
    share = blocks.share(cadence=max(1, round(TOKENS / training.plan.counts.tokens)))
    goal = Goal(f"overhead of a LoRA save every 4,000 tokens, {threads} torch threads", share.median(), 0.02, "%")
    return Part([share, blocks.extra_seconds()], [goal], blocks.facts())


class Blocks:
    """Cycles of blocks, one for each contestant and two quiet ones, in rotated order."""

    def __init__(
        self, training: Training, contestants: dict[str, Contestant], steps: int, is_at_each_step: bool = False
    ):
        self.training = training
        self.contestants = contestants
        self.steps = steps
        self.saves = steps if is_at_each_step else 1
        self.extra: dict[str, list[float]] = {name: [] for name in (*contestants, AGAIN)}
        """Seconds that a save added to its block."""
        self.extra_cpu: dict[str, list[float]] = {name: [] for name in contestants}
        self.quiet: list[float] = []
        self.spilled: list[float] = []
        """Seconds for which saves went on after their blocks."""

    @property
    def step_seconds(self) -> float:
        return sorted(self.quiet)[len(self.quiet) // 2] / self.steps

    def run(self, cycles: int) -> None:
        names = [QUIET, *self.contestants, AGAIN]
        for turn in range(-1, cycles):
            times = {name: self._block(name) for name in rotated(names, max(0, turn))}
            if turn < 0:  # buffers are made, and the first steps are slow
                self.spilled.clear()
                continue
            quiet = [(a + b) / 2 for a, b in zip(times[QUIET], times[AGAIN], strict=True)]
            self.quiet += [times[QUIET][0], times[AGAIN][0]]
            self.extra[AGAIN].append((times[AGAIN][0] - times[QUIET][0]) / self.saves)
            for name in self.contestants:
                self.extra[name].append((times[name][0] - quiet[0]) / self.saves)
                self.extra_cpu[name].append((times[name][1] - quiet[1]) / self.saves)

    def extra_seconds(self) -> Quantity:
        return Quantity("a save adds to the steps beside it (s)", "s", dict(self.extra))

    def share(self, cadence: int) -> Quantity:
        """The extra time of a save as a share of the steps between two of them."""
        quantity = Quantity(f"wall-clock overhead of a save every {cadence} steps of {self.step_seconds:.2f} s", "%")
        for name, seconds in self.extra.items():
            quantity.samples[name] = [extra / (cadence * self.step_seconds) for extra in seconds]
        quantity.notes = {AGAIN: "what the same measurement says where nothing is saved"}
        return quantity

    def facts(self) -> dict[str, object]:
        beyond = [seconds for seconds in self.spilled if seconds > 0.05]
        return {
            "state bytes": state_bytes(self.training.state),
            "torch threads": torch.get_num_threads(),
            "saves that outlived their block": f"{len(beyond)} of {len(self.spilled)}, at most {max(self.spilled):.2f} s",
        }

    def _block(self, name: str) -> tuple[float, float]:
        """Wall-clock and CPU seconds of one block."""
        save, ended = self.contestants.get(name), []
        started, cpu = time.perf_counter(), time.process_time()
        for number in range(self.steps):
            if save and number < self.saves:
                ended.append(save(self.training.state, self.training.recorder.path.parent))
            self.training.step()
        times = time.perf_counter() - started, time.process_time() - cpu
        if save:
            self.spilled.append(self._seconds_until(ended[-1]))
        return times

    def _seconds_until(self, ended: Ended) -> float:
        started = time.perf_counter()
        self.training.settle()
        while ended() is None:
            time.sleep(0.01)
        return time.perf_counter() - started
