"""Liger's kernels as operations of fake tensors: what each reads, makes and writes over, so that a trace can count it."""

from typing import Any

import torch
from torch import Tensor

from finetune.model.fused import liger

SUMS = 132
"""Multiprocessors of an H100: so many sums make the gradient of a norm's weight."""
OPERATIONS = (
    "norm(Tensor hidden, Tensor weight) -> (Tensor, Tensor)",
    "norm_backward(Tensor gradient, Tensor hidden, Tensor weight, Tensor scales, Tensor(a!) made, Tensor(b!)? sums) -> ()",
    "gated(Tensor gate, Tensor up) -> Tensor",
    "gated_backward(Tensor gradient, Tensor(a!) gate, Tensor(b!) up) -> ()",
    "rotated(Tensor(a!) queries, Tensor(b!) keys, Tensor cos, Tensor sin) -> ()",
)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        made, scales = torch.ops.liger.norm(hidden.contiguous(), weight)
        ctx.save_for_backward(hidden, weight, scales)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight, scales = ctx.saved_tensors
        made = torch.zeros_like(gradient)
        sums = weight.new_empty((SUMS, len(weight)), dtype=torch.float32) if ctx.needs_input_grad[1] else None
        torch.ops.liger.norm_backward(gradient.contiguous(), hidden, weight, scales, made, sums)
        return made, None if sums is None else sums.sum(0).to(weight.dtype)


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.ops.liger.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        torch.ops.liger.gated_backward(gradient.contiguous(), gate, up)
        return gate, up


class Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _in_place(queries, keys, cos, sin)

    @staticmethod
    def backward(ctx: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor | None, ...]:
        return *_in_place(queries, keys, *ctx.saved_tensors), None, None


def _in_place(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    queries, keys = (each.transpose(1, 2).contiguous() for each in (queries, keys))
    torch.ops.liger.rotated(queries, keys, cos, sin)
    return queries.transpose(1, 2), keys.transpose(1, 2)


def define() -> None:
    """From now on `fused.liger` calls them; in a fork, as all of a trace."""
    library = torch.library.Library("liger", "DEF")
    for operation in OPERATIONS:
        library.define(operation)
    made = {
        "norm": lambda hidden, _: (torch.empty_like(hidden), hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)),
        "gated": lambda gate, _: torch.empty_like(gate),
    }
    for operation in OPERATIONS:
        name = operation.partition("(")[0]
        torch.library.register_fake(f"liger::{name}", made.get(name, lambda *_: None), lib=library)
    define.library = library  # type: ignore[attr-defined] # what it defines ends with it
    liger.norm = lambda hidden, weight, *_: Norm.apply(hidden, weight)
    liger.gated = lambda gate, up, _: Gated.apply(gate, up)
    liger.rotated = Rotated.apply
