"""Which tensors of a model LoRA gets beside them: linear layers, and matrices that a family keeps in one tensor, like its experts'.

peft knows experts by the names of transformers 4. In some families it takes `gate_proj` for a part of `experts.gate_up_proj`, and then
misses every layer that is still called so.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.errors import AdapterError, explained
from finetune.model.adapters.member import quoted
from finetune.model.adapters.unfit import all_linear, excluded, frozen_layers, unfit_layers
from finetune.recipe.schema import LoraAdapter

ALL = ["all-linear"]
OLDER_NAMES = {
    "gate",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
}  # of experts and routers, in transformers 4
ROUTER = "gate.weight"
NO_PRODUCTS = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class Reach(NamedTuple):
    """What LoRA is put on, as settings of peft."""

    modules: str | list[str]
    parameters: list[str]
    excluded: str | list[str]
    """Names of layers, or one pattern."""
    patterns: dict[str, dict[str, Any]]
    """peft's own ranks of experts, by the name of the setting."""
    has_fused: bool
    """Whether matrices are added to weights before the product; then there is no dropout."""
    mended: tuple[str, ...]
    """Linear layers that peft misses by itself."""


def reach_of(model: PreTrainedModel, settings: LoraAdapter, is_whole: bool = True) -> Reach:
    """AdapterError for a name that matches nothing, or that LoRA cannot train. Without `is_whole` it has the gaps of peft: runs of
    older code trained so."""
    is_all = settings.targets == ALL
    frozen = frozen_layers(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = [name for name in linear if name not in frozen]
    unfit, dropped = unfit_layers(model), _dropped(model, linear)
    # A whole name means the layer that has it, and not experts that were called so once.
    literal = [target for target in settings.targets if _is_pattern(target) or (is_whole and "." in target)]
    config = _converted(model, "all-linear" if is_all else [each for each in settings.targets if each not in literal])
    head = model.get_output_embeddings()
    named = [name for name in linear if is_all and model.get_submodule(name) is not head]
    if not is_all:
        _refuse_targets(model, settings.targets, linear, unfit, dropped)
        named = matching(settings.targets, linear)
    named = [name for name in named if name not in unfit]
    own = [name for name in named if name.rpartition(".")[2] not in dropped]
    fused = _fused(model, settings.parameters)
    # Under `all-linear` peft trains routers of these families alone: one has to name them.
    added = [each for each in config.target_parameters or () if not (is_all and is_whole and each == ROUTER)]
    of_peft = matching(sorted(added), _trained(model))
    mended = [name for name in named if is_whole and name not in own and f"{name}.weight" not in of_peft]
    kept = _chosen(model, settings, [*own, *of_peft, *mended, *fused])
    weights = [f"{name}.weight" for name in mended if name in kept]
    has_fused = bool(kept & {*of_peft, *mended, *fused})
    is_as_named = not any(_is_pattern(each) or each.rpartition(".")[2] in dropped for each in literal)
    is_as_peft = len(added) == len(config.target_parameters or ())
    if is_as_named and is_as_peft and not settings.exclude and not settings.layers:
        head_name = next((name for name in linear if model.get_submodule(name) is head), None)
        modules = all_linear(linear, frozen, head_name) if is_all else list(settings.targets)
        without = excluded(linear, frozen, unfit)
        return Reach(modules, [*fused, *weights], without, {}, has_fused, tuple(mended))
    if not kept:
        raise AdapterError("no layer is left to train", where="adapter", hint="exclude less")
    parameters = [*(name for name in dict.fromkeys([*fused, *of_peft]) if name in kept), *weights]
    patterns = {
        each: found for each in ("rank_pattern", "alpha_pattern") if of_peft and (found := getattr(config, each))
    }
    return Reach([name for name in own if name in kept], parameters, [], patterns, has_fused, tuple(mended))


def matching(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that end with one of the targets at a dot, as in peft; `*` in a target matches any characters."""
    return [name for name in names if any(_is_named(target, name) for target in targets)]


def fused_matrices(model: PreTrainedModel) -> list[str]:
    """Parameters that hold several matrices, like those of experts."""
    return [name for name in _trained(model) if model.get_parameter(name).ndim == 3 and _reason(model, name) is None]


def _is_pattern(target: str) -> bool:
    return any(character in target for character in "*?[")


def _is_named(target: str, name: str) -> bool:
    if _is_pattern(target):
        return fnmatch.fnmatchcase(f".{name}", f"*.{target}")
    return f".{name}".endswith(f".{target}")


def _converted(model: PreTrainedModel, targets: str | list[str]) -> Any:
    """peft's config after it has renamed targets for this family."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert

    config = peft.LoraConfig(target_modules=targets, r=1, lora_alpha=1)
    with explained("peft cannot put an adapter on this base", "adapter.targets", "name both", AdapterError):
        convert(config, model, None)
    return config


def _dropped(model: PreTrainedModel, linear: list[str]) -> set[str]:
    """Last names of layers that peft takes for parts of experts in this family, wherever they are."""
    names = {name.rpartition(".")[2] for name in linear} | OLDER_NAMES
    return names - _converted(model, sorted(names)).target_modules


def _chosen(model: PreTrainedModel, settings: LoraAdapter, names: list[str]) -> set[str]:
    """Without what is excluded, and of the given layers alone. AdapterError for an exclusion or a layer that is not there."""
    known = [name for named in (model.named_modules(), model.named_parameters()) for name, _ in named]
    if missed := [target for target in settings.exclude if not matching([target], known)]:
        raise AdapterError(f"nothing in the base is called {quoted(missed)}", where="adapter.exclude", hint="remove it")
    without = set(matching(settings.exclude, names))
    numbers = {name: _layer_of(name) for name in names}
    if strange := sorted(set(settings.layers) - set(numbers.values())):
        known = sorted(number for number in set(numbers.values()) if number is not None)
        hint = f"layers are numbered {known[0]} to {known[-1]}" if known else "this base has no numbered layers"
        raise AdapterError(f"there is no layer {strange[0]}", where="adapter.layers", hint=hint)
    of_layers = {name for name in names if not settings.layers or numbers[name] in settings.layers}
    return of_layers - without


def _layer_of(name: str) -> int | None:
    """The first number in a name: within a layer, experts have numbers too."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _refuse_targets(
    model: PreTrainedModel, targets: list[str], linear: list[str], unfit: dict[str, str], dropped: set[str]
) -> None:
    """AdapterError for the first target that is no linear layer, or one that LoRA cannot train. A pattern skips such layers."""
    missed = [target for target in targets if target not in dropped and not matching([target], linear)]
    if missed:  # peft itself is silent as long as one of the targets matches
        known = sorted({name.rpartition(".")[2] for name in linear})
        hint = f"the base has {quoted(known)}"
        if fused := matching(missed, fused_matrices(model)):
            hint = f"name {quoted(sorted({_short(name) for name in fused}))} in adapter.parameters"
        raise AdapterError(f"no linear layer is called {quoted(missed)}", where="adapter.targets", hint=hint)
    for target in targets:
        found = matching([target], linear)
        bad = [name for name in found if name in unfit]
        if bad and (not _is_pattern(target) or len(bad) == len(found)):
            raise AdapterError(
                f"LoRA cannot train `{bad[0]}`: {unfit[bad[0]]}",
                where="adapter.targets",
                hint=f"remove `{target}` from adapter.targets",
            )


def _trained(model: PreTrainedModel) -> list[str]:
    """The parameters that were not frozen before, as those beside the text side are. Quantized ones are integers, and never trainable."""
    return [name for name, each in model.named_parameters() if each.requires_grad or not each.is_floating_point()]


def _short(name: str) -> str:
    """`experts.down_proj` of a parameter's whole name."""
    return ".".join(name.split(".")[-2:])


def _fused(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The parameters of `adapter.parameters`. A pattern takes those that fit, a name must fit."""
    names, found = _trained(model), []
    for target in targets:
        matched = matching([target], names)
        reasons = {name: reason for name in matched if (reason := _reason(model, name))}
        if not matched:
            known = sorted({_short(name) for name in fused_matrices(model)})
            hint = f"the base has {quoted(known)}" if known else "this base has none: name layers in adapter.targets"
            raise AdapterError(f"no parameter is called `{target}`", where="adapter.parameters", hint=hint)
        if reasons and (not _is_pattern(target) or len(reasons) == len(matched)):
            name, reason = next(iter(reasons.items()))
            hint = f"remove `{target}` from adapter.parameters"
            raise AdapterError(f"LoRA cannot train `{name}`: {reason}", where="adapter.parameters", hint=hint)
        found += [name for name in matched if name not in reasons]
    return list(dict.fromkeys(found))


def _reason(model: PreTrainedModel, name: str) -> str | None:
    """Why a parameter gets no matrices; None where it may."""
    tensor, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, torch.nn.Linear | Conv1D):
        return "it is a linear layer's, so it belongs in adapter.targets"
    if isinstance(owner, NO_PRODUCTS):
        return f"it is the weight of {type(owner).__name__}"
    if tensor.ndim not in (2, 3) or name.endswith("bias"):
        return "it is not a matrix"
    return None
