"""Weights as HQQ saves them, with the settings of each layer beside it (https://github.com/mobiusml/hqq)."""

import math

import torch

from finetune.model.base.dequantized.layouts import Layout, Parts, Unreadable, finite

SETTINGS = ("nbits", "axis", "group_size")
# told by the others, or settings of the quantization and not of its result
UNREAD = (
    *("view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero", "compute_dtype", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
WIDTHS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}


def layout() -> Layout:
    needed = ("scale", "zero", "shape", "packing", *SETTINGS)
    return Layout("W_q", ("U8", "I32"), needed, _decode, UNREAD, weight="weight", has_shape=False)


def _decode(parts: Parts) -> torch.Tensor:
    if any(parts[name].item() for name in ("view_as_float", "quant_scale", "quant_zero") if name in parts):
        raise Unreadable("its codes are stored as floats, or its scales are quantized too")
    shape, packing = parts["shape"].tolist(), bytes(parts["packing"].tolist()).decode(errors="replace")
    bits, axis, size = (int(parts[name].item()) for name in SETTINGS)
    if packing not in WIDTHS or len(shape) != 2 or axis not in (0, 1) or size < 1:
        raise Unreadable(f"its codes are packed as `{packing[:20]}` in groups of {size} along side {axis} of {shape}")
    codes = _unpacked(parts["W_q"], *WIDTHS[packing])
    count = math.prod(shape)
    rows = size if axis == 0 else count // size
    codes = codes[:rows] if bits == 3 else codes
    scales, zeros = parts["scale"].float(), parts["zero"].float()
    wanted = [1, count // size] if axis == 0 else [rows, 1]
    if codes.numel() != count or list(codes.shape)[axis == 0] * size != count and list(codes.shape) != [rows, size]:
        raise Unreadable(f"{codes.numel()} codes do not hold a weight of {shape} in groups of {size}")
    if list(scales.shape) != wanted or list(zeros.shape) not in (wanted, [], [1]):
        raise Unreadable(f"scales of the shape {list(scales.shape)} do not fit groups of {size} of a weight of {shape}")
    return finite((codes - zeros) * scales).reshape(shape)


def _unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes, from the high bits on: those of the first rows of the weight's groups are the highest of each word."""
    shifts = [bits * place for place in reversed(range(count))]
    return torch.cat([((words >> shift) & (2**bits - 1)).float() for shift in shifts])
