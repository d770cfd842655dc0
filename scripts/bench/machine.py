"""What the figures were measured on, and what else was running there."""

import os
import platform
import time
from pathlib import Path

import torch

from finetune import version

PACKAGES = ("finetune", "torch", "transformers", "accelerate", "safetensors", "numpy", "blake3", "xxhash")
TICKS = os.sysconf("SC_CLK_TCK")


def facts(work: Path) -> dict[str, object]:
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": _file_system(work),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
    }


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores others keep busy, sampled while this process sleeps."""
    before = _busy_ticks()
    time.sleep(seconds)
    return round((_busy_ticks() - before) / TICKS / seconds, 2)


def _busy_ticks() -> int:
    user, nice, system, _, _, irq, soft_irq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split(maxsplit=11)[1:11]
    )
    return user + nice + system + irq + soft_irq + steal


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _file_system(path: Path) -> str:
    """Type of the innermost mount that holds the path."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(point, kind) for point, kind in mounts if path.absolute().is_relative_to(point)]
    return max(around, key=lambda mount: len(mount[0]))[1]
