"""Attention within each row of a packed sequence: exact isolation, and no work on the blocks between rows.

The kernel must depend on device, precision and model alone, never on installed packages (docs/gpu.md).
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from finetune.errors import BaseError

PER_ROW = "finetune_per_row"
KERNEL_HEAD_SIZE = 256  # the largest of FlashAttention
KERNEL_CAPABILITY = (8, 0)  # Ampere; older GPUs take bf16 in autocast and have no such kernel


class Shape(NamedTuple):
    """A model's settings of attention, beside causality."""

    scale: float
    dropout: float
    window: int | None
    """A token sees itself and the `window - 1` tokens before it."""
    cap: float | None
    """Scores become cap * tanh(score / cap)."""


def per_row(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_bounds: list[int] | None = None,
    cu_seq_lens: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention of (B, heads, T, head size) within the rows of `row_bounds`; returns (B, T, heads, head size).

    `cu_seq_lens` is `row_bounds` as int32 on the device, for the GPU's kernel. Without bounds each sequence
    is one row. BaseError if the model's attention has an unknown part.
    """
    # Sinks (gpt-oss) and position biases (T5): to ignore them would train another model, silently.
    if unknown := [name for name in ("s_aux", "position_bias") if others.get(name) is not None]:
        message, hint = f"its attention takes {unknown[0]}, which packing does not know", "set task.packing: false"
        raise BaseError(message, where=type(module).__name__, hint=hint)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = Shape(scale, dropout, sliding_window, softcap)
    if cu_seq_lens is not None and row_bounds is not None and (dtype := _kernel_type(query, value, shape)):
        # From the host's list: to read a tensor of the device would wait for it.
        longest = max(end - start for start, end in zip(row_bounds[:-1], row_bounds[1:], strict=True))
        flat_query, flat_key, flat_value = (_flat(tensor, dtype) for tensor in (query, key, value))
        output = _in_one_call(flat_query, flat_key, flat_value, cu_seq_lens, longest, shape)
        # Without the zeros that filled up the head size.
        return output[None, ..., : value.shape[-1]], None
    return _row_by_row(query, key, value, row_bounds or [0, query.shape[2]], shape), None


def _kernel_type(query: Tensor, value: Tensor, shape: Shape) -> torch.dtype | None:
    """The type of the variable-length kernel for all rows; None if there is no such kernel."""
    dtype, is_cuda = _product_type(query), query.device.type == "cuda"
    has_kernel = is_cuda and dtype in (torch.bfloat16, torch.float16) and _capability(query) >= KERNEL_CAPABILITY
    fits = shape.cap is None and not shape.dropout and max(query.shape[-1], value.shape[-1]) <= KERNEL_HEAD_SIZE
    return dtype if has_kernel and fits else None


def _product_type(tensor: Tensor) -> torch.dtype:
    """The type of its products."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, heads, T, size) as the (T, heads, size) of the kernel."""
    # not `tensor[0]`, whose gradient is a copy of the whole tensor
    return tensor.squeeze(0).transpose(0, 1).to(dtype)


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, longest: int, shape: Shape) -> Tensor:
    """(T, heads, size) by torch's variable-length FlashAttention; zeros fill sizes up to a multiple of 8, as it needs."""
    size = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    query, key, value = (
        tensor if tensor.shape[-1] == size else F.pad(tensor, (0, size - tensor.shape[-1]))
        for tensor in (query, key, value)
    )
    # The kernel counts tokens to the left and right of a token; -1 sets no bound.
    window = (-1, 0) if shape.window is None else (shape.window - 1, 0)
    groups: dict[str, Any] = {}
    if _has_word_for_groups(varlen_attn):
        groups["enable_gqa"] = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=shape.scale,
        window_size=window,
        **groups,
    )
    return output[0] if isinstance(output, tuple) else output


@cache
def _has_word_for_groups(kernel: Callable[..., object]) -> bool:
    """Whether the kernel has the option for fewer key heads; torch 2.11 handles them without one."""
    return "enable_gqa" in signature(kernel).parameters


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], shape: Shape) -> Tensor:
    """One call for neighboring rows of one length: packing puts these side by side, and many short rows become few calls."""
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    runs = [(length, len(list(rows))) for length, rows in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the gradient of a slice is a zero tensor of the whole length, once for every row
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (length, count), run_parts in zip(runs, parts, strict=True):
        rows = [part.unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for part in run_parts]
        attended = _attend(rows[0], rows[1], rows[2], shape)
        outputs.append(attended.unflatten(0, (len(query), count)).flatten(1, 2))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """(rows, heads, length, size), all rows of one length -> (rows, length, heads, size)."""
    length = query.shape[2]
    if query.shape[1] != key.shape[1] and not _takes_groups(query):
        key, value = _repeated(key, value, query)
    # A row within its window needs no mask, and is faster without one.
    is_cut = shape.window is not None and length > shape.window
    if shape.cap is not None:
        return _capped(query, key, value, _mask(length, shape.window, query.device), shape, shape.cap).transpose(1, 2)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_mask(length, shape.window, query.device) if is_cut else None,
        is_causal=not is_cut,
        scale=shape.scale,
        dropout_p=shape.dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


def _takes_groups(query: Tensor) -> bool:
    """Whether a fused kernel takes fewer key heads than queries. The one for fp32 on CUDA does not, and all scores of a row would be in memory."""
    return query.device.type != "cuda" or _product_type(query) != torch.float32


def _repeated(key: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with a head for each of the query's."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) a query (row) sees."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # A window counts the token itself, too.
    return seen if window is None else seen.triu(1 - window)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, shape: Shape, cap: float) -> Tensor:
    """Attention with soft-capped scores. torch has no kernel for it, so all scores of a row are in memory."""
    key, value = _repeated(key, value, query)
    scores = torch.tanh(query @ key.transpose(2, 3) * (shape.scale / cap)) * cap
    # Softmax in fp32, as in Gemma 2's own attention.
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, shape.dropout) @ value


def windows_of(model: PreTrainedModel, inputs: dict[str, Any]) -> set[int | None]:
    """The windows of all layers, None for a layer without one. Some families put theirs into the mask alone, and
    `per_row` never sees it."""
    asked: set[int | None] = set()

    def asking(module: torch.nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, None]:
        asked.add(settings.get("sliding_window"))
        return per_row(module, *tensors, **settings)

    AttentionInterface.register(_ASKING, asking)
    model.set_attn_implementation(_ASKING)
    with torch.inference_mode():
        model(**inputs, use_cache=False)
    # The model is trained after this, with the real attention.
    model.set_attn_implementation(PER_ROW)
    return asked


_ASKING = f"{PER_ROW}_asking"
AttentionInterface.register(PER_ROW, per_row)
