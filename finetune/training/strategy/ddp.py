"""Every device holds the whole model; ranks average their gradients (DDP). One process alone is the smallest case."""

import ctypes
import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.hosts.world import cores, refuse_half
from finetune.model import adapters
from finetune.recipe.schema import Train
from finetune.training import collectives
from finetune.training.state import Strategy, TrainState

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
SUMMED_AT_ONCE = 1 << 20  # numbers: the sum of this many squares in fp32 is off by 1 in 10^6


def start(settings: Train) -> Accelerator:
    """Devices, precision and processes. FinetuneError where the launcher started fewer than it was asked for, or more than know of each other."""
    refuse_half(os.environ)
    collectives.refuse_other_ways()
    if settings.reproducibility == "exact":
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


def prepare(
    accelerator: Accelerator, objective: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Both, wrapped by Accelerate."""
    with warnings.catch_warnings():  # Accelerate gives DDP an older name of an option, and each rank says so
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return accelerator.prepare(objective, optimizer)


def gradient_norms(state: TrainState) -> Tensor:
    """2-norm of the gradient of each of the state's modules, fp64 on its device. Every rank has the same sums."""
    pairs = [
        (parameter.grad, place)
        for parameter, place in zip(state.trainable.values(), state.module_places, strict=True)
        if parameter.grad is not None
    ]
    if all(each.device.type == "cpu" and each.dtype == torch.float32 for each, _ in pairs):
        # torch's own norm is slower on a CPU, and of 28 million numbers off by 1 in 600
        pieces = [(piece, place) for each, place in pairs for piece in each.flatten().split(SUMMED_AT_ONCE)]
        squares = torch.stack([torch.dot(piece, piece) for piece, _ in pieces]).double()
        places = [place for _, place in pieces]
    else:
        norms = torch.stack(torch._foreach_norm([each for each, _ in pairs], 2, dtype=torch.float32))  # also of bf16
        squares = norms.double().square()
        places = [place for _, place in pairs]
    total = torch.zeros(len(state.modules), dtype=torch.float64, device=squares.device)
    return total.index_add_(0, state.places_on_device(tuple(places)), squares).sqrt()


def clip(state: TrainState, excess: float) -> None:
    """Divides the gradients by `excess`. Fused optimizers do it while they read the gradients. The others need a separate pass
    over as many bytes as the weights."""
    optimizer = state.optimizer.optimizer  # inside Accelerate's
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = torch.full((), excess, device=state.accelerator.device)
        return
    torch._foreach_div_([each.grad for each in state.trainable.values() if each.grad is not None], excess)


def saved_tensors(state: TrainState) -> dict[str, Tensor]:
    """All weights: every rank has them, and rank 0 saves."""
    return adapters.weights(state.model)


DDP = Strategy("ddp", start, prepare, gradient_norms, clip, saved_tensors)
