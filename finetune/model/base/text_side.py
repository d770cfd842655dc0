"""The text side of a model that also reads images or sound: its decoder, embeddings and head, wherever a family puts them.

Everything beside it takes no part in a forward of text. It is not trained, quantized or rounded: a package has the base's bytes.
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from finetune.errors import BaseError, explained, of_libraries
from finetune.model.base.loading_class import wide_class


def beside_text(model: PreTrainedModel) -> frozenset[str]:
    """The names of parameters and buffers beside the text side; none if the model is text alone."""
    if wide_class(model.config) is None:
        return frozenset()
    text = {id(tensor) for module in _text(model) for tensor in (*module.parameters(), *module.buffers())}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return frozenset(name for name, tensor in tensors if id(tensor) not in text)


def parts_beside(model: PreTrainedModel) -> list[str]:
    """The largest modules, or single tensors, that are all beside the text side."""
    return list(_parts(model, beside_text(model)))


def freeze_beside_text(model: PreTrainedModel) -> PreTrainedModel:
    """The model, of which only the text side can be trained. An adapter does not reach frozen layers."""
    beside = beside_text(model)
    for name, parameter in model.named_parameters():
        if name in beside:
            parameter.requires_grad_(False)
    return model


def refuse_mixed(model: PreTrainedModel) -> None:
    """BaseError if a forward of text uses weights beside the text side: they would be left untrained, silently."""
    beside = beside_text(model)
    others = {name: each for name, each in model.named_parameters() if name in beside and each.is_floating_point()}
    if not others:
        return
    states = {name: each.requires_grad for name, each in others.items()}
    for each in others.values():
        each.requires_grad_(True)
    with torch.enable_grad(), explained("transformers cannot run it", type(model).__name__):
        total = model(input_ids=torch.arange(2, 10)[None], use_cache=False).logits.float().sum()
        gradients = torch.autograd.grad(total, list(others.values()), allow_unused=True)
    for name, each in others.items():
        each.requires_grad_(states[name])
    if used := [name for name, gradient in zip(others, gradients, strict=True) if gradient is not None]:
        message, hint = f"its text goes through {used[0]}, outside its decoder", "choose another base"
        raise BaseError(message, where=type(model).__name__, hint=hint)


def _text(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for find in (model.get_decoder, model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = find()
        except of_libraries():  # a family without such a part
            continue
        if isinstance(module, torch.nn.Module):
            yield module


def _parts(model: torch.nn.Module, names: frozenset[str], prefix: str = "") -> Iterator[str]:
    """The largest modules (or single tensors) that hold these names and no others."""
    within = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if prefix and all(f"{prefix}{name}" in names for name in within):
        if within:
            yield prefix.rstrip(".")
        return
    own = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    yield from (f"{prefix}{name}" for name, _ in own if f"{prefix}{name}" in names)
    for name, child in model.named_children():
        if any(each.startswith(f"{prefix}{name}.") for each in names):
            yield from _parts(child, names, f"{prefix}{name}.")
