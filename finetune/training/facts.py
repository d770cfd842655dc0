"""What a training ran on: devices, versions, our own source. Recorded beside the plan, and compared when a run goes on."""

import hashlib
import os
import platform
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import finetune
from finetune import version
from finetune.plan import memory
from finetune.plan.facts import Machine, World
from finetune.training.counted import device_name

PACKAGES = ("finetune", "torch", "transformers", "accelerate", "peft", "safetensors", "datasets")


def software() -> dict[str, str]:
    """What a training ran: digests of our own source and of the list of installed packages with their versions, and the image that it ran
    in, where FINETUNE_IMAGE names it. Recorded, not compared: what matters for equal bits is in the versions."""
    source = sorted(Path(finetune.__file__).parent.rglob("*.py"))
    # Contents in the order of their paths: the same code has the same digest in every directory.
    code = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in source)).hexdigest()
    # The names of these directories have name and version, so no file is opened.
    installed = sorted({found.name for place in sys.path for found in Path(place).glob("*.dist-info")})
    lock = hashlib.sha256("\n".join(installed).encode()).hexdigest()
    image = os.environ.get("FINETUNE_IMAGE")
    return {"code": f"sha256:{code}", "lock": f"sha256:{lock}", **({"image": image} if image else {})}


def sharing_of(strategy: str) -> World:
    """How devices share the work, as `plan.json` records it."""
    world_size, beside = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if strategy == "hsdp":
        return {"strategy": strategy, "hosts": world_size // beside}
    return {"strategy": strategy}


def facts_of(accelerator: Accelerator, strategy: str | None = None) -> Machine:
    """What the bits depend on, beside plan and code; with a strategy once it is known."""
    device = accelerator.device
    found: Machine = {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "device": device_name(device),
        "world_size": accelerator.num_processes,
        # Threads split sums, so another number of them rounds differently.
        "threads": torch.get_num_threads(),
        # It decides the order of random numbers for weights in bf16.
        "update_slice": memory.update_slice(device.type),
    }
    return {**found, **sharing_of(strategy)} if strategy else found
