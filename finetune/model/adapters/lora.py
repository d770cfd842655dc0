"""LoRA: peft's low-rank matrices beside frozen linear layers."""

import re
import warnings
from collections.abc import Collection
from itertools import accumulate
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.errors import AdapterError, explained, of_libraries
from finetune.model.adapters.member import Member, quoted
from finetune.recipe.schema import LoraAdapter

ALL = ["all-linear"]
TARGETS_HINT = "name its layers in adapter.targets, or train without an adapter"


def put_on(model: PreTrainedModel, settings: LoraAdapter, **options: Any) -> PreTrainedModel:
    """The model with peft's LoRA matrices, fp32; only they are trained. Options go to peft's config."""
    import peft

    frozen = _frozen(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = [name for name in linear if name not in frozen]
    is_all = settings.targets == ALL
    missed = [target for target in settings.targets if not is_all and not _named(target, linear)]
    if missed:  # peft itself is silent as long as one of the targets matches
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise AdapterError(
            f"no linear layer is called {quoted(missed)}",
            where="adapter.targets",
            hint=f"the base has {quoted(known)}",
        )
    unfit = _unfit(model)
    if not is_all:
        _refuse_unfit(settings.targets, unfit)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),  # whatever its type says, peft takes fractions
        lora_dropout=settings.dropout,
        target_modules=_all(linear, frozen) if is_all else list(settings.targets),
        exclude_modules=_excluded(linear, frozen, unfit),
        task_type="CAUSAL_LM",
        **options,
    )
    # peft still asks transformers by an old name
    with (
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        explained("peft cannot put an adapter on this base", "adapter", TARGETS_HINT, AdapterError),
    ):
        # what peft's model has not itself, it has from the one in it
        return cast(PreTrainedModel, peft.get_peft_model(model, config))


def _all(linear: list[str], frozen: frozenset[str]) -> str | list[str]:
    """What `all-linear` stands for. peft's own takes last names of frozen layers too: `0`, in a vision tower, is every first layer."""
    return sorted({name.rpartition(".")[2] for name in linear}) if frozen else "all-linear"


def _excluded(linear: list[str], frozen: frozenset[str], unfit: Collection[str]) -> str | list[str] | None:
    """The layers that get no matrices, as names, or as a pattern with the largest modules that have only frozen ones."""
    if not frozen:
        return sorted(unfit) or None
    reached = {prefix for name in linear for prefix in accumulate(name.split("."), "{}.{}".format)}
    largest = {
        next(prefix for prefix in accumulate(name.split("."), "{}.{}".format) if prefix not in reached)
        for name in frozen
    }
    return f"(?:{'|'.join(map(re.escape, sorted({*largest, *unfit})))})(?:\\..*)?"


def skipped(model: PreTrainedModel, settings: LoraAdapter) -> str | None:
    """Which layers of the bare model `all-linear` skips beside the head, and why; None if it takes all of them."""
    if settings.targets != ALL:
        return None
    head = model.get_output_embeddings()
    reasons: dict[str, set[str]] = {}
    for name, reason in _unfit(model).items():
        if model.get_submodule(name) is not head:
            reasons.setdefault(reason, set()).add(name.rpartition(".")[2])
    told = [f"{quoted(sorted(names))} ({reason})" for reason, names in reasons.items()]
    return f"all-linear skips {', '.join(told)}" if told else None


def _frozen(model: PreTrainedModel) -> frozenset[str]:
    """Linear layers that were frozen before: those beside the text side. Quantized weights are integers, and never trainable."""
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module.weight.is_floating_point()
        and not module.weight.requires_grad
    )


def _unfit(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers LoRA must not wrap, by name, each with the reason; without frozen ones."""
    import peft
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as peft_refuses

    config = peft.LoraConfig()
    found: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    frozen = _frozen(model)
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


def _refuse_unfit(targets: list[str], unfit: dict[str, str]) -> None:
    """AdapterError for the first target that reaches a forbidden layer."""
    for target in targets:
        for name in _named(target, list(unfit)):
            raise AdapterError(
                f"LoRA cannot train `{name}`: {unfit[name]}",
                where="adapter.targets",
                hint=f"remove `{target}` from adapter.targets",
            )


def _named(target: str, names: list[str]) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{target}")]


MEMBER = Member(put_on, skipped)
