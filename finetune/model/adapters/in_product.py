"""LoRA as a GPU does it fastest: inputs in the type in which they come, and matrices added within the second product.

It rounds once where peft's own forward rounds three times, so a run keeps the way in which it began (`Plan.gpu_sums`).
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel


def sum_as_a_gpu(model: PreTrainedModel) -> None:
    """Changes the layers of an adapted model in place. Names, parameters and what peft reads of them stay as they are."""
    for layer in _layers(model):
        layer._cast_input_dtype = MethodType(_cast, layer)
        if type(layer.base_layer) is torch.nn.Linear:
            layer.forward = MethodType(_forward, layer)


def _cast(layer: Any, input_: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast casts it in the product: peft's copy in the type of the matrices would be written and read between."""
    if torch.is_autocast_enabled(input_.device.type):
        return input_
    return type(layer)._cast_input_dtype(layer, input_, dtype)


def _layers(model: PreTrainedModel) -> Iterator[Any]:
    """Linear layers with matrices beside them; not those with a variant like DoRA, and not quantized ones, whose forward differs."""
    from peft.tuners.lora import Linear

    return (module for module in model.modules() if type(module) is Linear and not module.lora_variant)


def _forward(layer: Any, input_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(…, in) -> (…, out): base(x) + scale * (x A^T) B^T, the last product and the sum in one kernel."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    is_plain = len(active) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
    down = layer.lora_A[active[0]] if is_plain else None
    device, is_autocast = input_.device.type, torch.is_autocast_enabled(input_.device.type)
    if down is None or not (is_autocast or input_.dtype == down.weight.dtype):
        return type(layer).forward(layer, input_, *args, **kwargs)
    name, base = active[0], layer.base_layer
    dropout, up, scale = layer.lora_dropout[name], layer.lora_B[name], layer.scaling[name]
    # in two dimensions: added to a view, the gradient would be copied whole
    flat = input_.flatten(0, -2)
    if isinstance(dropout, torch.nn.Dropout) and layer.training:
        output = base(flat)
        low = down(dropout(flat)).to(output.dtype)
        # in place: nothing else reads the base's output, and the product of the base keeps none of it
        output.addmm_(low, up.weight.to(output.dtype).T, alpha=scale)
    else:
        dtype = torch.get_autocast_dtype(device) if is_autocast else input_.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        given = (each.to(dtype) for each in (flat, base.weight, down.weight, up.weight))
        output = Added.apply(*given, bias, scale)
    return output.unflatten(0, input_.shape[:-1])


class Added(torch.autograd.Function):
    """A frozen linear layer with LoRA's matrices: their part of the input's gradient is added within its product, too.

    Shapes: (N, in), weight (out, in), down (rank, in), up (out, rank), bias (out,). All have one type.
    """

    @staticmethod
    def forward(
        ctx: Any, input_: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        low = input_ @ down.T
        ctx.save_for_backward(input_, weight, down, up, low)
        ctx.scale = scale
        return F.linear(input_, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None, None]:
        input_, weight, down, up, low = ctx.saved_tensors
        # both are as narrow as the rank
        low_grad, up_grad = (grad @ up).mul_(ctx.scale), (grad.T @ low).mul_(ctx.scale)
        input_grad = (grad @ weight).addmm_(low_grad, down) if ctx.needs_input_grad[0] else None
        return input_grad, None, low_grad.T @ input_, up_grad, None, None
