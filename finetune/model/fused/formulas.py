"""What the kernels compute, in plain torch: by these formulas the modules of a family are recognized, and kernels are tested.

Shapes: any leading ones; D numbers of a token or a head; H heads, T tokens.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Casting = Literal["llama", "gemma"]
Activation = Literal["silu", "gelu_tanh"]


class Norm(NamedTuple):
    """A root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    offset: float
    """What is added to its weight."""
    casting: Casting
    """Where numbers become those of the input's type again: before the weight (`llama`) or after it (`gemma`)."""
    eps: str
    """Its attribute with the small term."""


class Gated(NamedTuple):
    """A gated feed-forward (Shazeer 2020, arXiv 2002.05202): the names of its layers. `gate` and `up` are one where that makes both."""

    activation: Activation
    gate: str
    up: str
    down: str


def norm(hidden: Tensor, weight: Tensor, found: Norm, eps: float) -> Tensor:
    """(…, D), (D,) -> (…, D)."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if found.casting == "llama":
        return (found.offset + weight) * wide.to(hidden.dtype)
    return ((found.offset + weight.float()) * wide).to(hidden.dtype)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, T, D) by (B or 1, T, R): the first R of D numbers turn, each with the one R / 2 after it (Su et al. 2021, arXiv 2104.09864)."""
    size = cos.shape[-1]
    turned, kept = states[..., :size], states[..., size:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)
