"""Inspects this machine for `finetune doctor`: its parts, and problems you would meet."""

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TypedDict

from finetune import version
from finetune.plan.disk import readable
from finetune.plan.memory import machine_bytes
from finetune.store import cache

PACKAGES = (
    "finetune",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
)


class Machine(TypedDict):
    """What `doctor --json` prints."""

    python: str
    platform: str
    packages: dict[str, str | None]
    device: str
    devices: int
    cores: int | None
    threads: int
    memory_bytes: int
    cache: str
    has_hard_links: bool
    free_bytes: int
    has_token: bool
    warnings: list[str]


def facts() -> Machine:
    """Versions, devices, memory, disk, and a list of warnings."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found: Machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": str(accelerator or "cpu"),
        "devices": torch.accelerator.device_count() if accelerator else 0,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": machine_bytes(),
        "cache": str(cache.root()),
        "has_hard_links": _has_hard_links(Path.cwd()),
        "free_bytes": shutil.disk_usage(Path.cwd()).free,
        "has_token": bool(os.environ.get("HF_TOKEN") or os.environ.get("HF_TOKEN_PATH")),
        "warnings": [],
    }
    return {**found, "warnings": _warnings(found)}


def listing(found: Machine) -> str:
    """The same for a reader."""
    lines = [
        f"{name:16}{value}"
        for name, value in found.items()
        if name not in ("packages", "warnings", "memory_bytes", "free_bytes")
    ]
    sizes = (("memory_bytes", found["memory_bytes"]), ("free_bytes", found["free_bytes"]))
    lines += [f"{name:16}{readable(size)}" for name, size in sizes]
    lines += [f"{name:16}{installed or 'not installed'}" for name, installed in found["packages"].items()]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in found["warnings"])])


def _warnings(found: Machine) -> list[str]:
    warnings = []
    if found["device"] == "cpu" and shutil.which("nvidia-smi"):
        warnings.append(
            "there is an NVIDIA driver, but this torch sees no GPU: install a torch built for its CUDA version"
        )
    if not found["has_hard_links"]:
        warnings.append("this file system has no hard links: what does not change is copied into every checkpoint")
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        warnings.append("PYTHONDONTWRITEBYTECODE doubles the time every command takes to start")
    if found["free_bytes"] < 5 * 2**30:
        warnings.append("less than 5 GiB of disk are free here")
    return warnings


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _has_hard_links(directory: Path) -> bool:
    try:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            file = Path(folder, "file")
            file.touch()
            Path(folder, "link").hardlink_to(file)
    except OSError:
        return False
    return True
