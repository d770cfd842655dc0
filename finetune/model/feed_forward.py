"""The feed-forward of decoder layers on pieces of a long sequence: its wide activations exist for one piece at a time.

As sequence tiling in ALST (Bekman et al. 2025, arXiv 2506.13996). A piece is checkpointed: its activations are computed again in
the backward pass. The sum over tokens in the gradients of weights is then taken piece by piece.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import BaseError, of_libraries
from finetune.model import shards
from finetune.model.losses import unwrapped

TOKENS = 8  # of the trial
TOLERANCE = 1e-3  # of its norm; in bf16 a product of four rows may be rounded otherwise than one of eight


def in_pieces(model: PreTrainedModel, tokens: int) -> int:
    """Runs each feed-forward on at most so many tokens at once, and returns how many there are. BaseError where none is found."""
    found: list[torch.nn.Module] = []
    for layer in _layers(model):
        with shards.whole(layer):
            found += _feed_forwards(layer, _hidden(model))
    if not found:
        message, hint = "the layers of this base have no feed-forward that can be taken apart", "remove the key"
        raise BaseError(message, where="train.mlp_chunk_tokens", hint=hint)
    for module in found:
        module.forward = _split(module.forward, tokens)
    return len(found)


def _split(whole: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    """A forward of (B, T, D) or (T, D) that takes at most `tokens` of them at once."""

    def forward(hidden: Tensor) -> Tensor:
        length = hidden.shape[-2]
        size = max(1, tokens // (hidden.numel() // (length * hidden.shape[-1]))) if hidden.numel() else length
        if length <= size:
            return whole(hidden)
        if not torch.is_grad_enabled():
            return torch.cat([whole(piece) for piece in hidden.split(size, dim=-2)], dim=-2)
        # split, not slices: the gradient of a slice is a zero tensor of the whole length, once for every piece
        pieces = [_again(whole, piece) for piece in hidden.split(size, dim=-2)]
        return torch.cat(pieces, dim=-2)

    return forward


def _again(whole: Callable[[Tensor], Tensor], piece: Tensor) -> Tensor:
    return cast(Tensor, checkpoint(whole, piece, use_reentrant=False))


def _layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def _hidden(model: PreTrainedModel) -> int:
    return cast(Tensor, unwrapped(model).get_input_embeddings().weight).shape[1]


def _feed_forwards(layer: torch.nn.Module, hidden: int) -> Iterator[torch.nn.Module]:
    """The parts of a layer that treat each token by itself, widen it and narrow it again; beside experts the shared ones."""
    for part in layer.children():
        if _has_experts(part):
            yield from (inner for inner in part.children() if not _has_experts(inner) and _is_one(inner, hidden))
        elif _is_one(part, hidden):
            yield part


def _has_experts(module: torch.nn.Module) -> bool:
    """Whether tokens go to different weights in it: then its rows differ in number, and figures of its router are of the whole batch."""
    is_fused = any(parameter.ndim > 2 for parameter in module.parameters())
    return is_fused or any(isinstance(each, torch.nn.ModuleList) for each in module.modules())


def _is_one(module: torch.nn.Module, hidden: int) -> bool:
    """By its weights: two that take the hidden states or make them. By trial: the same from tokens alone as from all together."""
    weights = [each for each in module.parameters() if each.ndim == 2]
    if len(weights) < 2 or isinstance(module, torch.nn.ModuleList):
        return False
    parameter, training = weights[0], module.training
    numbers = torch.arange(TOKENS * hidden, device=parameter.device)
    tokens = (numbers * 2_654_435_761 % 1009 / 504.5 - 1).reshape(1, TOKENS, hidden)
    half = TOKENS // 2
    # in eval mode, where dropout draws nothing; autocast brings weights of several types together
    is_mixed = any(each.dtype != torch.float32 for each in module.parameters())
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, torch.bfloat16, enabled=is_mixed):
            together = module.eval()(tokens)
            apart = [module(piece) for piece in tokens.split(half, dim=1)]
    except of_libraries():  # it wants more than hidden states
        return False
    finally:
        module.train(training)
    if not isinstance(together, Tensor) or together.shape != tokens.shape:
        return False
    tolerance = 0.02 if is_mixed else TOLERANCE
    difference = (torch.cat(apart, dim=1) - together).float().norm()
    return bool(difference <= tolerance * together.float().norm())
