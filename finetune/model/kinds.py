"""The kinds of modules that a model's parameters belong to: attention, feed-forward, experts, embeddings, and so on."""

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.model.losses import unwrapped
from finetune.plan.kinds import BESIDE_TEXT, EMBEDDINGS, HEAD, SINKS, OfKind

# The first kind whose pattern is found in a parameter's name; what has none is `other`.
KINDS = {
    SINKS: re.compile(r"\.sinks$"),
    "norms": re.compile(r"norm|layernorm|(^|\.)ln_?\w*\."),
    "experts": re.compile(r"(?<!shared_)experts?\."),
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|feed_?forward|ffn|(^|\.)ff\.|fc_?\d|shared_experts?\.|dense_(\d?h|4h)|_proj_mlp|moe"),
}
MISSED_KINDS = ("attention", "mlp", "experts")


def kind_of(parameter: str) -> str:
    """The kind of a layer's parameter, by its name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(parameter)), "other")


def by_kind(model: PreTrainedModel, beside: Collection[int] = ()) -> dict[str, OfKind]:
    """The base's parameters by kind of module. `beside` are the ids of those that are not of the model's text side."""
    inner = unwrapped(model)
    special: dict[int, str] = {}
    for kind, module in ((HEAD, inner.get_output_embeddings()), (EMBEDDINGS, inner.get_input_embeddings())):
        # peft wraps a trained head or embedding.
        module = getattr(module, "base_layer", module)
        special |= {id(each): kind for each in module.parameters()} if module is not None else {}
    special |= dict.fromkeys(_weights_of(model, torch.nn.Embedding), EMBEDDINGS)
    special |= dict.fromkeys(beside, BESIDE_TEXT)
    linear = _weights_of(model, torch.nn.Linear, Conv1D) - special.keys()
    adapters = [module for module in model.modules() if hasattr(module, "lora_A")]
    wrapped = {id(each) for module in adapters for each in _wrapped_by(module)}
    summed = {id(each) for module in adapters if hasattr(module, "get_param") for each in _wrapped_by(module)}
    found: dict[str, OfKind] = {}
    for name, each in model.named_parameters():
        if ".lora_" in name:
            continue
        kind, count = special.get(id(each)) or kind_of(name), each.numel()
        one = found.setdefault(kind, OfKind(parameters=0, trained=0, under_adapter=0, summed=0, linear=0))
        one["parameters"] += count
        one["trained"] += each.requires_grad * count
        one["under_adapter"] += (id(each) in wrapped and not each.requires_grad) * count
        one["summed"] += (id(each) in summed) * count
        one["linear"] += (id(each) in linear) * count
    return found


def _weights_of(model: PreTrainedModel, *kinds: type[torch.nn.Module]) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds)}


def _wrapped_by(module: Any) -> Iterable[torch.nn.Parameter]:
    """The parameters under an adapter's module: peft wraps one tensor of a module of experts, or a whole layer."""
    return [module.get_param()] if hasattr(module, "get_param") else module.base_layer.parameters()


def missed(kinds: dict[str, OfKind]) -> str | None:
    """A line for a user whose adapter misses most of a kind of layer, as `all-linear` misses experts that are not linear layers."""
    total = sum(one["parameters"] for one in kinds.values())
    told = []
    for kind in kinds.keys() & set(MISSED_KINDS):
        count, held = kinds[kind]["parameters"], kinds[kind]["trained"] + kinds[kind]["under_adapter"]
        if held < count / 2 and count > total / 20:
            told.append(f"{held / count:.0%} of {kind} ({count / total:.0%} of the base)")
    return f"the adapter reaches {', '.join(sorted(told))}" if told else None


def active(model: PreTrainedModel, experts: int, of_token: int) -> int:
    """The parameters that a token uses: of a layer's `experts` it goes to `of_token`."""
    shares = ((kind_of(name) == "experts", each.numel()) for name, each in model.named_parameters())
    return sum(count * of_token // experts if is_of_experts and experts else count for is_of_experts, count in shares)


def unquantized(kinds: dict[str, OfKind]) -> dict[str, int]:
    """What of the text side would stay as it is beside quantized layers, by kind; embeddings and head always do, and do not count."""
    others = {kind: one for kind, one in kinds.items() if kind not in (HEAD, EMBEDDINGS, BESIDE_TEXT)}
    left = {kind: one["parameters"] - one["linear"] for kind, one in others.items()}
    return dict(sorted(((kind, count) for kind, count in left.items() if count), key=lambda item: -item[1]))
