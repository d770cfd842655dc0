"""A contestant in a separate process: its environment, time and memory, and the load of other processes meanwhile."""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MALLOC = {
    # glibc gives large blocks back to the kernel and faults them in again, page by page, in every step: here it keeps them
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": "34359738368",
        "MALLOC_TRIM_THRESHOLD_": "34359738368",
        "MALLOC_TOP_PAD_": "67108864",
    },
    "plain": {},
}
SAMPLED_SECONDS = 0.1
TICKS = os.sysconf("SC_CLK_TCK")


class ContestantError(Exception):
    """A contestant's process failed."""


@dataclass(frozen=True)
class Outcome:
    started: float
    """On the wall clock, before the process was made."""
    seconds: float
    peak_bytes: int
    """The most memory it was resident in, as the kernel counted it."""
    cpu_seconds: float
    """User and system, of the process and of those that it started."""
    others_busy_cores: float
    """How many cores the rest of the machine kept busy meanwhile."""


def environment(malloc: str, threads: int, cache: Path) -> dict[str, str]:
    """The same for every contestant."""
    dropped = {"PYTHONDONTWRITEBYTECODE", *MALLOC["tuned"]}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    own = {"OMP_NUM_THREADS": str(threads), "FINETUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return kept | own | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"} | MALLOC[malloc]


def run(command: Sequence[str | Path], env: dict[str, str], log: Path) -> Outcome:
    """Runs a command to its end; its output goes to `log`. Raises ContestantError with the end of that."""
    os.sync()  # what the one before left to write would be written now
    busy_before, started, clock = _busy_seconds(), time.time(), time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=output, stderr=output)
        peak_bytes, status = 0, None
        while status is None:
            time.sleep(SAMPLED_SECONDS)
            # the kernel's own high-water mark; the one of wait4 begins at this process's size
            peak_bytes = max(peak_bytes, _peak_bytes(process.pid))
            ended, code, usage = os.wait4(process.pid, os.WNOHANG)
            status = code if ended else None
    seconds = time.perf_counter() - clock
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ContestantError(f"{command}: exit {process.returncode}\n{log.read_text(errors='replace')[-3000:]}")
    own = usage.ru_utime + usage.ru_stime
    others = max(0.0, _busy_seconds() - busy_before - own) / seconds
    return Outcome(started, seconds, peak_bytes, own, round(others, 3))


def matmul_peak(dtype: torch.dtype, size: int, repeats: int = 8) -> float:
    """GFLOP/s of the best of some square matrix products."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


def _busy_seconds() -> float:
    fields = Path("/proc/stat").read_text().split(maxsplit=11)[1:11]
    user, nice, system, _, _, irq, soft_irq, steal, *_ = map(int, fields)
    return (user + nice + system + irq + soft_irq + steal) / TICKS


def _peak_bytes(process: int) -> int:
    """The most it was resident in so far; 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
