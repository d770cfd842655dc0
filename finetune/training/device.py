"""What this process trains on, and how a plan uses it."""

import os

import torch

from finetune.hosts.asked import ASKED
from finetune.plan import memory
from finetune.plan import strategy as strategies
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape


def device() -> memory.Device:
    """What this process trains on. Its whole memory, not what is free now: `plan`, `train` and all ranks must see the same."""
    world_size, beside = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    asked = os.environ.get(ASKED, "")
    if torch.accelerator.is_available():
        total = torch.accelerator.get_memory_info()[1]
        host = memory.machine_bytes()
        return memory.Device(total, is_gpu=True, world_size=world_size, host_bytes=host, processes=beside, asked=asked)
    own = memory.machine_bytes() // beside
    return memory.Device(own, world_size=world_size, processes=beside, asked=asked)


def shared(plan: Plan, shape: Shape) -> tuple[str, int]:
    """How devices share the work, and the tokens of a micro-batch."""
    strategy, named = strategies.strategy(plan, shape, device()), plan.recipe.train.micro_batch_tokens
    return strategy, strategies.micro_batch_tokens(plan, shape, device()) if named == "auto" else named
