"""Every device holds the whole model; ranks average their gradients (DDP). One process alone is the smallest case."""

import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from finetune.model import adapters
from finetune.model.shards import local
from finetune.training.state import Strategy, TrainState

SUMMED_AT_ONCE = 1 << 20  # numbers: the sum of this many squares in fp32 is off by 1 in 10^6


def prepare(
    accelerator: Accelerator, objective: torch.nn.Module, optimizer: Callable[[], torch.optim.Optimizer]
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Both, wrapped by Accelerate."""
    with warnings.catch_warnings():  # Accelerate gives DDP an older name of an option, and each rank says so
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return accelerator.prepare(objective, optimizer())


def gradient_norms(state: TrainState) -> Tensor:
    """2-norm of the gradient of each of the state's modules, fp64 on its device. Every rank has the same sums."""
    return gradient_squares(state).sqrt()


def gradient_squares(state: TrainState) -> Tensor:
    """The sum of the squares of each module's gradients, of what this rank holds of them; fp64 on its device."""
    pairs = [
        (local(parameter.grad), place)
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
    return total.index_add_(0, state.places_on_device(tuple(places)), squares)


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


DDP = Strategy("ddp", prepare, gradient_norms, clip, saved_tensors)
