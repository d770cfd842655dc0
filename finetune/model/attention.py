"""Floor 1. Attention within each row of a packed sequence: exact isolation, and no work on the blocks between rows.

Registered with transformers under `PER_ROW`; `state` chooses it when the plan packs. A dense block-diagonal mask gives
the same result and costs 2 to 4 times as much on a CPU, because masked blocks are computed all the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from finetune.errors import BaseError

PER_ROW = "finetune_per_row"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # of Gemma 2, GPT-OSS and T5


def per_row(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_bounds: list[int] | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention of (1, heads, T, head size) in the rows that `row_bounds` delimits; returns (1, T, heads, head size).

    BaseError when the model's attention has a part that is unknown here: left out, it would train another model.
    """
    if unknown := [name for name in UNKNOWN if others.get(name) is not None]:
        message, hint = f"its attention takes {unknown[0]}, which packing does not know", "set task.packing: false"
        raise BaseError(message, where=type(module).__name__, hint=hint)
    bounds = row_bounds or [0, query.shape[2]]
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    # split, not slices: the gradient of a slice is a zero tensor of the whole length, once for every row
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    rows = [
        F.scaled_dot_product_attention(
            row_query,
            row_key,
            row_value,
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for row_query, row_key, row_value in parts
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PER_ROW, per_row)
