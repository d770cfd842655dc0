"""Every device holds its rows of each tensor; a decoder layer is whole only while it runs (FSDP2).

Zhao et al. 2023, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`. Accelerate owns devices, processes and precision; its own
plugin does nothing on CPUs, and rounds the loss to bf16, so the sharding is asked of torch.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import AutocastKwargs
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.model import adapters, shards
from finetune.model.shards import local
from finetune.training.state import Strategy, TrainState
from finetune.training.strategy import ddp


def prepare(
    accelerator: Accelerator, objective: torch.nn.Module, optimizer: Callable[[], torch.optim.Optimizer]
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Both, sharded over all ranks: parameters become DTensors in place, and keep their names."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return prepare_on(mesh, accelerator, objective, optimizer)


def prepare_on(
    mesh: DeviceMesh,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    optimizer: Callable[[], torch.optim.Optimizer],
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Both, sharded over the last dimension of a mesh."""
    # Autocast decides the precision of products, as without sharding. Only sums over ranks are said here: in fp32.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Autocast's cache would keep a bf16 copy of every weight until the end of the forward pass: the whole model on each device.
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    # What is not read yet has no numbers to move. Beyond that it is autocast alone; nothing is wrapped.
    is_unread = any(parameter.is_meta for parameter in objective.parameters())
    objective = accelerator.prepare_model(objective, device_placement=not is_unread, evaluation_mode=True)
    layers = [module for module in objective.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The rest is one group, whole during forward and backward: embeddings, last norm, and the head that the loss reads.
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided once, by the weight of the step. Set on the root alone, the layers would still divide.
            module.set_gradient_divide_factor(1.0)
            # A factor of 1 is a kind of sum that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    return objective, accelerator.prepare_optimizer(optimizer())


def gradient_norms(state: TrainState) -> Tensor:
    """2-norm of the gradient of each of the state's modules over all ranks, fp64 on its device."""
    squares = ddp.gradient_squares(state)
    dist.all_reduce(squares, group=shards.sharing(next(iter(state.trainable.values()))))
    return squares.sqrt()


def clip(state: TrainState, excess: float) -> None:
    """Divides this rank's rows of the gradients."""
    torch._foreach_div_([local(each.grad) for each in state.trainable.values() if each.grad is not None], excess)


def saved_tensors(state: TrainState) -> dict[str, Tensor]:
    """All weights, of each the rows of this rank."""
    return adapters.weights(state.model)


FSDP = Strategy("fsdp", prepare, gradient_norms, clip, saved_tensors, is_sharded=True)
