"""Averages of LoRA adapters by their products: the sum of w (alpha / r) B A over members is one adapter, of the sum of their ranks.

The mean of factors would be wrong: a product of means is not the mean of products. What is more than factors (DoRA's magnitudes,
biases, whole modules) has no such form.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from finetune.compare.average_full import as_bytes, kept_ema
from finetune.compare.average_members import Member
from finetune.model import base
from finetune.model.adapters import NAME
from finetune.store.checkpoints.tensor_files import ADAPTER
from finetune.store.tensors import Tensor, read_header

CONFIG = "adapter_config.json"
NAMES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
RANKS = ("r", "rank_pattern")
REACH = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")
# Settings that an adapter of factors alone may have; with any other it is more than that.
PLAIN = {
    *RANKS,
    *REACH,
    *SCALES,
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("lora_dropout", "fan_in_fan_out", "init_lora_weights", "inference_mode", "ensure_weight_tying"),
    *("eva_config", "loftq_config", "runtime_config", "megatron_core", "qalora_group_size"),
}
WHOLE = 1e-12  # a weight that differs less from 1 is 1: it was summed


class Layer(NamedTuple):
    """The factors of one matrix, by their names in a file."""

    a: str
    """(experts * rank, in): the experts of a tensor one after the other."""
    b: str
    """(out, rank * experts): of each rank the experts side by side, as peft has them."""
    rank: int
    scale: float
    experts: int
    inputs: int
    outputs: int

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of its factors in another rank."""
        return (self.experts * rank, self.inputs), (self.outputs, rank * self.experts)


@dataclass(frozen=True)
class Adapter:
    """The factors of a member, read a layer at a time."""

    weight: float
    config: dict[str, Any]
    layers: Mapping[str, Layer]
    read: Callable[[str], torch.Tensor]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (experts, rank, in), and w (alpha / r) B as (out, rank, experts); fp64."""
        layer = self.layers[name]
        a, b = self.read(layer.a).double(), self.read(layer.b).double()
        b = b.reshape(len(b), layer.rank, layer.experts) * (self.weight * layer.scale)
        return a.reshape(layer.experts, layer.rank, -1), b


class Made(NamedTuple):
    """An adapter that is written a layer at a time."""

    tensors: list[Tensor]
    config: dict[str, Any]


def adapters_of(members: Sequence[Member], files: ExitStack, is_kept_ema: bool = False) -> list[Adapter] | str:
    """The members beside the base, or the reason why their average is no adapter."""
    found: list[Adapter] = []
    layers: dict[str, Mapping[str, Layer]] = {}
    for member in (each for each in members if not each.is_base):
        if not member.is_adapter:
            return f"{member.ref} is a whole model"
        config = json.loads((member.directory / CONFIG).read_bytes())
        if config["peft_type"] != "LORA":
            return f"{member.ref} is an adapter of the type {config['peft_type']}"
        if extra := beside_factors(config):
            return f"{member.ref} is more than factors of matrices ({', '.join(extra)})"
        path = kept_ema(member)[0] if is_kept_ema else member.directory / ADAPTER
        key = json.dumps([config.get(name) for name in (*RANKS, *REACH, *SCALES)])
        if key not in layers:
            layers[key] = layers_of(member)
        header = read_header(path)
        named = {name for layer in layers[key].values() for name in (layer.a, layer.b)}
        if named != header.keys() or any(len(place.shape) != 2 for place in header.values()):
            return f"{member.ref} has tensors that are not factors of matrices"
        read = files.enter_context(safe_open(path, "pt")).get_tensor
        found.append(Adapter(member.weight, config, layers[key], read))
    first = found[0].config
    has_pattern = any(each.config.get("rank_pattern") for each in found)
    same = (*REACH, *(RANKS if has_pattern else ()))
    if any(_sorted(each.config.get(key)) != _sorted(first.get(key)) for each in found for key in same):
        return "the adapters reach different layers"
    return found


def beside_factors(config: Mapping[str, object]) -> list[str]:
    """The settings by which an adapter of the type LORA is more than factors of matrices."""
    return sorted(key for key, value in config.items() if value and key not in PLAIN and value != "none")


def layers_of(member: Member) -> dict[str, Layer]:
    """The adapted layers by their names in peft's model, asked of it without weights: it knows ranks and scales by patterns."""
    from peft.tuners.lora import LoraLayer

    kind = base.class_below(member.directory, member.base_directory, member.ref)
    model = base.attach(base.empty_model(member.base_directory, kind), member.directory, member.ref)
    names = read_header(member.directory / ADAPTER)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.scaling:
            a, b = next((pair for pair in NAMES if f"{name}.{pair[0]}" in names), NAMES[0])
            experts = int(getattr(module, "num_experts", 1))
            a, b = f"{name}.{a}", f"{name}.{b}"
            if not {a, b} <= names.keys():
                continue  # the caller misses it
            sizes = names[a].shape[-1], names[b].shape[0]
            found[name] = Layer(a, b, module.r[NAME], module.scaling[NAME], experts, *sizes)
    return found


def is_as_it_is(adapters: Sequence[Adapter]) -> bool:
    """Whether the average is its one member."""
    return len(adapters) == 1 and abs(adapters[0].weight - 1) < WHOLE


def copied(adapter: Adapter) -> Made:
    """The adapter itself."""
    tensors = []
    for name in (name for layer in adapter.layers.values() for name in (layer.a, layer.b)):
        tensor = adapter.read(name)
        tensors.append(Tensor(name, base.STORED_DTYPES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor)))
    return Made(tensors, adapter.config)


def is_small(adapters: Sequence[Adapter]) -> bool:
    """Whether the factors of the average have fewer numbers than the matrices that they change."""
    factors = matrices = 0
    for name, layer in adapters[0].layers.items():
        rank = sum(each.layers[name].rank for each in adapters)
        factors += layer.experts * rank * (layer.inputs + layer.outputs)
        matrices += layer.experts * layer.inputs * layer.outputs
    return factors < matrices


def concatenated(adapters: Sequence[Adapter]) -> Made:
    """The average without a loss: ranks add up, and scales are in B, in fp32."""
    ranks = [each.config["r"] for each in adapters]
    pattern = {key: rank * len(adapters) for key, rank in (adapters[0].config.get("rank_pattern") or {}).items()}
    tensors = []
    for name, layer in adapters[0].layers.items():
        shapes = layer.shapes(sum(each.layers[name].rank for each in adapters))
        tensors += [
            Tensor(one, "F32", shape, b"", make=partial(_joined, adapters, name, place))
            for place, (one, shape) in enumerate(zip((layer.a, layer.b), shapes, strict=True))
        ]
    return Made(tensors, _config(adapters[0].config, sum(ranks), pattern))


def truncated(adapters: Sequence[Adapter], rank: int) -> tuple[Made, float]:
    """The nearest adapter of a rank, by the singular values of each layer's sum of products (Eckart & Young 1936); and the part of that
    sum's norm that is lost, over all layers."""
    tensors, lost, total = [], 0.0, 0.0
    for name, layer in adapters[0].layers.items():
        factors, of_layer, of_lost = _nearest(adapters, name, rank)
        total, lost = total + of_layer, lost + of_lost
        tensors += [
            Tensor(one, "F32", shape, as_bytes(part.float().reshape(shape)))
            for one, shape, part in zip((layer.a, layer.b), layer.shapes(rank), factors, strict=True)
        ]
    return Made(tensors, _config(adapters[0].config, rank, {})), math.sqrt(lost / total) if total else 0.0


def _config(config: dict[str, Any], rank: int, pattern: dict[str, int]) -> dict[str, Any]:
    """The config of an adapter whose scale is 1 everywhere."""
    scales = {"lora_alpha": rank, "alpha_pattern": pattern, "use_rslora": False}
    return config | {"r": rank, "rank_pattern": pattern, **scales, "init_lora_weights": True, "inference_mode": True}


def _joined(adapters: Sequence[Adapter], name: str, place: int) -> memoryview:
    parts = [each.factors(name)[place] for each in adapters]
    joined = torch.cat(parts, dim=1).float()
    return as_bytes(joined.reshape(-1, joined.shape[2]) if place == 0 else joined.reshape(len(joined), -1))


def _nearest(
    adapters: Sequence[Adapter], name: str, rank: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, float]:
    """A and B of a layer in a rank, and the squared norms of the whole sum and of what is lost. Fewer ranks are filled with zeros."""
    parts = [each.factors(name) for each in adapters]
    a, b = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    left, right = torch.linalg.qr(b.permute(2, 0, 1)), torch.linalg.qr(a.transpose(1, 2))
    u, values, v = torch.linalg.svd(left.R @ right.R.transpose(1, 2), full_matrices=False)
    kept = min(rank, values.shape[1])
    roots = values[:, :kept].sqrt()
    nearest_a = torch.zeros(len(a), rank, a.shape[2], dtype=a.dtype)
    nearest_b = torch.zeros(len(a), b.shape[0], rank, dtype=a.dtype)
    nearest_a[:, :kept] = roots[:, :, None] * (v[:, :kept] @ right.Q.transpose(1, 2))
    nearest_b[:, :, :kept] = left.Q @ u[:, :, :kept] * roots[:, None, :]
    squares = values.square()
    return (nearest_a, nearest_b.permute(1, 2, 0)), float(squares.sum()), float(squares[:, kept:].sum())


def _sorted(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value or None
