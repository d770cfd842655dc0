"""Versions, and what a device does at most: `limits.py ANSWER`."""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

from finetune import version

PACKAGES = ("finetune", "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "liger_kernel", "triton")
SIDE = 8192  # of the matrices
WORDS = 2**28  # of fp32, a GiB


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def seconds_of(work: Callable[[], object], turns: int = 10) -> float:
    for _ in range(3):
        work()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(turns):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / turns / 1000


def of_device() -> dict:
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = torch.empty(WORDS, device="cuda"), torch.empty(WORDS, device="cuda")
    memory = torch.empty(WORDS)
    started = time.perf_counter()
    runtime = torch.cuda.cudart()
    runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)
    locking = time.perf_counter() - started
    found = {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": torch.cuda.mem_get_info()[1],
        "product_tflops": round(2 * SIDE**3 / seconds_of(lambda: left @ right) / 1e12, 1),
        "copy_tb_s": round(2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / 1e12, 3),
        "to_host_gb_s": round(memory.nbytes / seconds_of(lambda: memory.copy_(source, non_blocking=True), 3) / 1e9, 1),
        "page_lock_seconds_per_gib": round(locking, 3),
    }
    runtime.cudaHostUnregister(memory.data_ptr())
    return found


def main() -> None:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["versions"] = {package: installed(package) for package in PACKAGES}
    found |= (
        of_device() if torch.cuda.is_available() else {"device": f"cpu {platform.machine()}", "product_tflops": None}
    )
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
