"""A model with kernels in place of some of its modules' code. Its modules, their weights and their names stay what they are."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.model.fused import liger
from finetune.model.fused.formulas import Gated, Norm
from finetune.model.fused.found import Parts, halves
from finetune.model.losses import unwrapped

MARK = "finetune_fused"
"""An attribute of a model that has kernels."""


@dataclass
class Switch:
    """Whether the modules of a model run in kernels, or by their own code."""

    is_on: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    """Of each kind of kernel, to show that it ran."""

    def count(self, kind: str) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1


def switch_of(model: PreTrainedModel) -> Switch | None:
    """None for a model without kernels."""
    return cast(Switch | None, getattr(unwrapped(model), MARK, None))


def apply(model: PreTrainedModel, parts: Parts) -> Switch:
    """From now on the modules of these classes run in kernels. Call it before anything else wraps their forward."""
    switch = Switch()
    for module in model.modules():
        name = type(module).__name__
        if (norm := parts.norms.get(name)) and getattr(module, "weight", None) is not None:
            module.forward = _norm(module, norm, switch)
        if gated := parts.gated.get(name):
            module.forward = _gated(module, gated, switch)
        if rotary := parts.rotary.get(name):
            module.forward = _rotary(module, rotary, switch)
    setattr(model, MARK, switch)
    return switch


def _norm(module: torch.nn.Module, found: Norm, switch: Switch) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    def forward(hidden: Tensor) -> Tensor:
        if not switch.is_on:
            return plain(hidden)
        switch.count("norms")
        made = liger.norm(hidden, cast(Tensor, module.weight), found, float(getattr(module, found.eps)))
        kind = hidden.device.type
        # Once here, where autocast would do it again for each product that reads it.
        return made.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else made

    return forward


def _gated(module: torch.nn.Module, found: Gated, switch: Switch) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    def forward(hidden: Tensor) -> Tensor:
        if not switch.is_on:
            return plain(hidden)
        switch.count("gated")
        # Looked up in each call: an adapter wraps them later.
        gate = module.get_submodule(found.gate)(hidden)
        up = None if found.gate == found.up else module.get_submodule(found.up)(hidden)
        return cast(Tensor, module.get_submodule(found.down)(liger.gated(*halves(gate, up), found.activation)))

    return forward


def _rotary(module: torch.nn.Module, name: str, switch: Switch) -> Callable[..., Any]:
    """The module's own forward, in whose code that name means the kernel: other models of its class keep theirs."""
    own = cast(types.FunctionType, type(module).forward)
    plain = own.__globals__[name]

    def turned(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        # in a layout or with a choice that the kernel does not know
        if not switch.is_on or others or named or cos.ndim != 3:
            return plain(queries, keys, cos, sin, *others, **named)
        switch.count("rotary")
        return liger.rotated(queries, keys, cos, sin)

    code = types.FunctionType(
        own.__code__, {**own.__globals__, name: turned}, own.__name__, own.__defaults__, own.__closure__
    )
    code.__kwdefaults__ = own.__kwdefaults__
    return types.MethodType(code, module)
