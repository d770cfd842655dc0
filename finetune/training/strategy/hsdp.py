"""As `fsdp` among the devices of each host; every host holds all rows, and hosts exchange the sums of their gradients alone.

So layers are gathered within a host, where devices are near each other. Zhao et al. 2023, arXiv 2304.11277, section 3.2.2.
"""

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.device_mesh import init_device_mesh

from finetune.errors import FinetuneError
from finetune.training.state import Strategy
from finetune.training.strategy import fsdp


def prepare(
    accelerator: Accelerator, objective: torch.nn.Module, optimizer: Callable[[], torch.optim.Optimizer]
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Both, sharded over the ranks of this host. FinetuneError where hosts have different numbers of them."""
    ranks, beside = accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks % beside or accelerator.process_index % beside != accelerator.local_process_index:
        hint = "start the same number of processes on every host, or set train.strategy: fsdp"
        raise FinetuneError("hosts have different numbers of processes", where="train.strategy", hint=hint)
    mesh = init_device_mesh(accelerator.device.type, (ranks // beside, beside), mesh_dim_names=("hosts", "devices"))
    return fsdp.prepare_on(mesh, accelerator, objective, optimizer)


HSDP = Strategy("hsdp", prepare, fsdp.gradient_norms, fsdp.clip, fsdp.saved_tensors, is_sharded=True)
