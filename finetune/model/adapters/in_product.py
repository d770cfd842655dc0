"""LoRA as a GPU does it fastest. It rounds otherwise than peft's own, so a run keeps the way in which it began (`Plan.gpu_sums`)."""

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


def _cast(layer: Any, input_: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast casts it in the product: peft's copy in the type of the matrices would be written and read between."""
    if torch.is_autocast_enabled(input_.device.type):
        return input_
    return type(layer)._cast_input_dtype(layer, input_, dtype)


def _layers(model: PreTrainedModel) -> Iterator[Any]:
    """Linear layers with matrices beside them; not those with a variant like DoRA, and not quantized ones, whose forward differs."""
    from peft.tuners.lora import Linear

    return (module for module in model.modules() if type(module) is Linear and not module.lora_variant)
