"""The trained part of a model: all weights, all but some tensors, or matrices beside it.

An adapter `x` of the recipe is the `MEMBER` of the file `x.py` here, and its section in `recipe/schema/adapters.py`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from finetune.errors import CheckpointError
from finetune.model import shards
from finetune.model.adapters.in_product import sum_as_a_gpu as sum_as_a_gpu
from finetune.model.adapters.member import Member, quoted
from finetune.plan.plan import Plan
from finetune.recipe.schema.adapters import SECTIONS, Adapter

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "default"  # peft's name of the one adapter; it appears in parameter names
ADAPTERS: dict[str, Member] = {name: import_module(f"{__name__}.{name}").MEMBER for name in SECTIONS}


def apply(model: PreTrainedModel, settings: Adapter | None, is_older: bool = False) -> PreTrainedModel:
    """The model to train; without an adapter section every parameter is. `is_older` is for a run that began with code which reached
    something else (`is_changed`)."""
    if settings is None:
        return model
    member = ADAPTERS[settings.name]
    return (member.put_on_older if is_older and member.put_on_older else member.put_on)(model, settings)


def is_changed(model: PreTrainedModel, settings: Adapter | None) -> bool:
    """Whether an adapter reaches something else of the bare model than with older code."""
    member = ADAPTERS[settings.name] if settings else None
    return bool(member and member.is_changed and member.is_changed(model, settings))


def skipped(model: PreTrainedModel, settings: Adapter | None) -> str | None:
    """Which layers of the bare model an adapter skips, and why; None if it skips none."""
    member = ADAPTERS[settings.name] if settings else None
    return member.skipped(model, settings) if member and member.skipped else None


def is_adapter(model: PreTrainedModel) -> bool:
    """Whether the model's checkpoints hold an adapter, not whole weights."""
    return hasattr(model, "peft_config")


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint stores, by the names that `from_pretrained` (or peft's) expects; tied ones once."""
    if is_adapter(model):
        import peft

        return peft.get_peft_model_state_dict(cast("PeftModel", model), save_embedding_layers=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copies a checkpoint's tensors into the model. An unknown or a missing name is an error."""
    with torch.no_grad():
        own = weights(model)
        if own.keys() != tensors.keys():
            surprise = sorted(own.keys() ^ tensors.keys())
            raise CheckpointError(f"does not fit the model: {quoted(surprise[:5])} in only one of them")
        for name, tensor in own.items():
            shards.local(tensor).copy_(tensors[name])


def store_frozen_as_bf16(model: PreTrainedModel) -> None:
    """Keeps the base's linear weights as autocast would cast them before every product: the same bits, half the memory.

    Copies the other tensors out of the base's mapped file: one tensor would keep all its pages in memory.
    """
    for module in model.modules():
        is_frozen = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        if is_frozen and module.weight.dtype == torch.float32 and not _is_tied(module, model):  # quantized ones stay
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        is_mapped = parameter.device.type == "cpu"
        if is_mapped and not parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.clone()


def linear_weights(model: PreTrainedModel) -> frozenset[str]:
    """The names of the weights that `store_frozen_as_bf16` would cast under an adapter, in a model without one."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not _is_tied(module, model)
    }
    return frozenset(f"{name}.{each}" for name, module in modules.items() for each, _ in module.named_parameters())


@contextmanager
def taken_for_fp32(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Use it around adding an adapter: peft draws its matrices in fp32, and rounds them to their layer's type."""
    pairs = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if name in names and not parameter.is_meta
    ]
    for parameter, tensor in pairs:
        parameter.data = _of_no_memory(tensor.shape, torch.float32, tensor.device)
    try:
        yield
    finally:
        for parameter, tensor in pairs:
            parameter.data = tensor


@contextmanager
def taken_for_real(model: PreTrainedModel, in_fp32: Collection[str], device: torch.device) -> Iterator[None]:
    """Use it around adding an adapter to a model on the meta device: peft draws its matrices on the device, as beside real weights.

    `in_fp32` are taken for fp32, too. What is frozen meanwhile stays so.
    """
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    standing: dict[int, torch.nn.Parameter] = {}
    places = []
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                places.append((module, attribute, parameter))
    for module, attribute, parameter in places:
        if id(parameter) not in standing:
            dtype = torch.float32 if named[id(parameter)] in in_fp32 else parameter.dtype
            numbers = _of_no_memory(parameter.shape, dtype, device)
            standing[id(parameter)] = torch.nn.Parameter(numbers, requires_grad=parameter.requires_grad)
        module._parameters[attribute] = standing[id(parameter)]
    try:
        yield
    finally:
        for module, attribute, parameter in places:
            parameter.requires_grad_(standing[id(parameter)].requires_grad)
            module._parameters[attribute] = parameter


def _of_no_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _is_tied(module: torch.nn.Module, model: PreTrainedModel) -> bool:
    return module.weight is model.get_input_embeddings().weight


def config_of(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """peft's config of the adapter; it names the base by Hub id and commit, or as the recipe does, never by a path of this machine."""
    config = cast("PeftModel", model).peft_config[NAME].to_dict()
    named = plan.recipe.base.origin or plan.recipe.base.checkpoint
    is_hub = plan.base.kind == "hub" or plan.recipe.base.origin
    config["base_model_name_or_path"] = named.partition("@")[0] if is_hub else Path(named).name
    config["revision"] = plan.base.revision if plan.base.kind == "hub" else None
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
