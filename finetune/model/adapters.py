"""What of the base is trained: everything, all but some tensors, or low-rank matrices beside it.

A member of `ADAPTERS` takes the loaded model (also on the meta device, for counting) and returns the model to train.
"""

import fnmatch
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from finetune.errors import AdapterError, CheckpointError, explained, of_libraries
from finetune.plan.plan import Plan
from finetune.recipe.schema import FrozenAdapter, LoraAdapter

NAME = "default"  # peft's name of the one adapter; it appears in parameter names
ALL = ["all-linear"]
TARGETS_HINT = "name its layers in adapter.targets, or train without an adapter"


def lora(model: torch.nn.Module, settings: LoraAdapter) -> torch.nn.Module:
    """The model with peft's LoRA matrices, fp32; only they are trained."""
    import peft

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    is_all = settings.targets == ALL
    missed = [target for target in settings.targets if not is_all and not _named(target, linear)]
    if missed:  # peft itself is silent as long as one of the targets matches
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise AdapterError(
            f"no linear layer is called {_quoted(missed)}",
            where="adapter.targets",
            hint=f"the base has {_quoted(known)}",
        )
    unfit = _unfit(model)
    if not is_all:
        _refuse_unfit(settings.targets, unfit)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if is_all else list(settings.targets),
        exclude_modules=sorted(unfit) or None,
        task_type="CAUSAL_LM",
    )
    # peft still asks transformers by an old name
    with (
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        explained("peft cannot put an adapter on this base", "adapter", TARGETS_HINT, AdapterError),
    ):
        return peft.get_peft_model(model, config)


def skipped(model: torch.nn.Module, settings: LoraAdapter | FrozenAdapter | None) -> str | None:
    """What `all-linear` passes over on the bare model, beside the head, and why; None where it takes every linear layer."""
    if not isinstance(settings, LoraAdapter) or settings.targets != ALL:
        return None
    head = model.get_output_embeddings()
    reasons: dict[str, set[str]] = {}
    for name, reason in _unfit(model).items():
        if model.get_submodule(name) is not head:
            reasons.setdefault(reason, set()).add(name.rpartition(".")[2])
    told = [f"{_quoted(sorted(names))} ({reason})" for reason, names in reasons.items()]
    return f"all-linear skips {', '.join(told)}" if told else None


def _unfit(model: torch.nn.Module) -> dict[str, str]:
    """Linear layers that LoRA must not wrap, by name, each with the reason."""
    import peft
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as peft_refuses

    config, found = peft.LoraConfig(), {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            owners.setdefault(id(module.weight), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D):
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


def _acts_as_linear(module: torch.nn.Module) -> bool:
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


def _refuse_unfit(targets: list[str], unfit: dict[str, str]) -> None:
    """AdapterError for the first target that reaches a layer which must not be wrapped."""
    for target in targets:
        for name in _named(target, list(unfit)):
            raise AdapterError(
                f"LoRA cannot train `{name}`: {unfit[name]}",
                where="adapter.targets",
                hint=f"remove `{target}` from adapter.targets",
            )


def frozen(model: torch.nn.Module, settings: FrozenAdapter) -> torch.nn.Module:
    """The model itself; parameters whose names match a pattern of `freeze` keep their values."""
    names = [name for name, _ in model.named_parameters()]
    missed = [pattern for pattern in settings.freeze if not fnmatch.filter(names, pattern)]
    if missed:
        raise AdapterError(
            f"no parameter is called {_quoted(missed)}",
            where="adapter.freeze",
            hint=f"parameters are called like {_quoted(names[:3])}",
        )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError(
            "every parameter is frozen, so there is nothing to train", where="adapter.freeze", hint="freeze fewer"
        )
    return model


ADAPTERS: dict[str, Callable] = {"lora": lora, "frozen": frozen}


def apply(model: torch.nn.Module, settings: LoraAdapter | FrozenAdapter | None) -> torch.nn.Module:
    """The model to train; without an adapter section every parameter is."""
    return ADAPTERS[settings.name](model, settings) if settings else model


def is_adapter(model: torch.nn.Module) -> bool:
    """Whether the model's checkpoints hold an adapter, not whole weights."""
    return hasattr(model, "peft_config")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint stores, by the names that `from_pretrained` (or peft's) expects; tied ones once."""
    if is_adapter(model):
        import peft

        return peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies a checkpoint's tensors into the model. A name too many or too few is an error."""
    with torch.no_grad():
        own = weights(model)
        if own.keys() != tensors.keys():
            surprise = sorted(own.keys() ^ tensors.keys())
            raise CheckpointError(f"does not fit the model: {_quoted(surprise[:5])} in only one of them")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def store_frozen_as_bf16(model: torch.nn.Module) -> None:
    """Keeps the base's linear weights as autocast would cast them before every product: the same bits, half the memory.

    What stays is copied out of the base's file, which is mapped: one tensor would keep all pages that were read resident.
    """
    for module in model.modules():
        is_frozen = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        if is_frozen and module.weight.dtype == torch.float32 and not _is_tied(module, model):  # quantized ones stay
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        is_mapped = parameter.device.type == "cpu"
        if is_mapped and not parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.clone()


def linear_weights(model: torch.nn.Module) -> frozenset[str]:
    """The names of what `store_frozen_as_bf16` would take beneath an adapter, in a model that has none yet."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not _is_tied(module, model)
    }
    return frozenset(f"{name}.{each}" for name, module in modules.items() for each, _ in module.named_parameters())


@contextmanager
def taken_for_fp32(model: torch.nn.Module, names: Collection[str]) -> Iterator[None]:
    """While an adapter is put on: peft draws its matrices in fp32, and rounds them to the type of the layer that they are beside."""
    pairs = [(parameter, parameter.data) for name, parameter in model.named_parameters() if name in names]
    for parameter, tensor in pairs:
        parameter.data = torch.zeros((), device=tensor.device).expand(tensor.shape)  # takes no memory
    try:
        yield
    finally:
        for parameter, tensor in pairs:
            parameter.data = tensor


def _is_tied(module: torch.nn.Linear, model: torch.nn.Module) -> bool:
    return module.weight is model.get_input_embeddings().weight


def _named(target: str, names: list[str]) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{target}")]


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def config_of(model: torch.nn.Module, plan: Plan) -> dict:
    """peft's config of the adapter; the base is named by Hub id and commit, or as in the recipe, never by a path of this machine."""
    config = model.peft_config[NAME].to_dict()
    named = plan.recipe.base.origin or plan.recipe.base.checkpoint
    is_hub = plan.base.kind == "hub" or plan.recipe.base.origin
    config["base_model_name_or_path"] = named.partition("@")[0] if is_hub else Path(named).name
    config["revision"] = plan.base.revision if plan.base.kind == "hub" else None
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
