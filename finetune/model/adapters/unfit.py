"""Linear layers that LoRA must not wrap."""

import re
from collections.abc import Collection
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.errors import of_libraries


def unfit_layers(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers LoRA must not wrap, by name, each with the reason; without frozen ones."""
    import peft
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as peft_refuses

    config = peft.LoraConfig()
    found: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    frozen = frozen_layers(model)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            owners.setdefault(id(module.weight), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or name in frozen:
            continue
        others = [other for other in owners.get(id(module.weight), []) if other != name]
        if others:
            found[name] = "another module has the same weight"
        elif not _acts_as_linear(module):
            found[name] = "it is not a plain linear layer"
        else:
            try:  # asked name by name: it would raise at the first one, with the model half changed
                peft_refuses(config, model, name.rpartition(".")[2])
            except ValueError:
                found[name] = "peft does not allow it in this family"
    return found


def frozen_layers(model: PreTrainedModel) -> frozenset[str]:
    """Linear layers that were frozen before: those beside the text side. Quantized weights are integers, and never trainable."""
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module.weight.is_floating_point()
        and not module.weight.requires_grad
    )


def _acts_as_linear(module: Any) -> bool:
    """Whether a layer maps (…, in) to (…, out). Some routers and grouped layers are linear by class alone."""
    kind = type(module)
    if kind.forward in (torch.nn.Linear.forward, Conv1D.forward) or not kind.__module__.startswith(
        "transformers.models"
    ):
        return True
    weight = module.weight
    made = weight.new_zeros(1, 2, module.in_features)
    try:
        with torch.no_grad():
            output = module(made)
    except of_libraries():
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, module.out_features)


def all_linear(linear: list[str], frozen: frozenset[str], head: str | None) -> str | list[str]:
    """What `all-linear` is for peft. Its own takes last names of frozen layers too: `0`, in a vision tower, is every first layer."""
    return sorted({name.rpartition(".")[2] for name in linear if name != head}) if frozen else "all-linear"


def excluded(linear: list[str], frozen: frozenset[str], unfit: Collection[str]) -> str | list[str]:
    """The layers that get no matrices, as names, or as a pattern with the largest modules that have only frozen ones."""
    if not frozen:
        return sorted(unfit)
    reached = {prefix for name in linear for prefix in accumulate(name.split("."), "{}.{}".format)}
    largest = {
        next(prefix for prefix in accumulate(name.split("."), "{}.{}".format) if prefix not in reached)
        for name in frozen
    }
    return f"(?:{'|'.join(map(re.escape, sorted({*largest, *unfit})))})(?:\\..*)?"
