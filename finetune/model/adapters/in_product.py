"""LoRA as a GPU does it fastest: inputs in the type in which they come, and matrices added within the second product.

It rounds once where peft's own forward rounds three times, so a run keeps the way in which it began (`Plan.gpu_sums`).
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor
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
    """(…, in) -> (…, out): base(x) + scale * (x A^T) B^T, the last product and both sums in one kernel."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    is_plain = len(active) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
    down = layer.lora_A[active[0]] if is_plain else None
    if down is None or not (torch.is_autocast_enabled(input_.device.type) or input_.dtype == down.weight.dtype):
        return type(layer).forward(layer, input_, *args, **kwargs)
    name = active[0]
    # in two dimensions: added to a view, the gradient would be copied whole
    flat = input_.flatten(0, -2)
    output = layer.base_layer(flat)
    low = down(layer.lora_dropout[name](flat)).to(output.dtype)
    up = layer.lora_B[name].weight.to(output.dtype)
    # in place: nothing else reads the base's output, and the product of the base keeps none of it
    return output.addmm_(low, up.T, alpha=layer.scaling[name]).unflatten(0, input_.shape[:-1])
