"""Devices, precision and processes of a training, as Accelerate finds them. How they share its work is decided later."""

import ctypes
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from finetune.errors import FinetuneError
from finetune.hosts import asked
from finetune.hosts.world import cores, refuse_half
from finetune.recipe.schema import Train
from finetune.training import collectives

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def start_accelerator(settings: Train) -> Accelerator:
    """Devices, precision and processes. FinetuneError where the launcher started fewer than it was asked for, or more than know of each other."""
    refuse_half(os.environ)
    asked.take(settings)
    if settings.reproducibility != "fast":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose another order of summation
        torch.use_deterministic_algorithms(True)
        # a check for careless kernels that writes every buffer twice
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 the module answers for it
    if not torch.accelerator.is_available():
        _keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())  # torch counts the host's cores: beyond the quota they hinder each other
    AcceleratorState._reset_state()  # else a second one in this process inherits the first one's precision
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        # Plain DDP rebuilds its buckets after the first backward, so a resumed run would sum in another order than an
        # uninterrupted one (seen with 3 and 4 ranks); with unused-parameter search on, it never rebuilds them.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    declared = collectives.declared()
    if accelerator.num_processes != declared:
        raise FinetuneError(
            f"the launcher was asked for {declared} processes, and {accelerator.num_processes} know of each other",
            hint=f"on CPUs `finetune launch --nproc-per-node {declared} RECIPE` starts as many; `accelerate launch` starts one",
        )
    collectives.connect(accelerator)
    return accelerator


def _keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one: to get it from the system again, zeroed page by page, took a third of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            mallopt(name, value)
