"""Weights as bitsandbytes saves them: 4 bits with a table of numbers, or LLM.int8(). Needs no bitsandbytes: the files hold it all."""

import json
import math

import torch

from finetune.model.base.dequantized.layouts import Layout, Parts, Unreadable, finite

STATE = ".quant_state.bitsandbytes__"
NESTED = (".nested_absmax", ".nested_quant_map")
INVERSE = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def four_bits(kind: str) -> Layout:
    """`nf4` or `fp4`: two codes in a byte, the first in its high bits; a scale for every block of the flat weight, which may be
    in 8 bits itself (double quantization, arXiv 2305.14314)."""
    needed = (".absmax", ".quant_map", STATE + kind)
    return Layout("", ("U8",), needed, _four_bits, NESTED, has_shape=False)


def eight_bits() -> Layout:
    """A byte for each weight, and the largest value of each row (arXiv 2208.07339)."""
    return Layout("weight", ("I8",), ("SCB",), _eight_bits, ("weight_format",), weight="weight")


def _four_bits(parts: Parts) -> torch.Tensor:
    state = next(tensor for name, tensor in parts.items() if name.startswith(STATE))
    try:
        said = json.loads(bytes(state.tolist()))
        shape, size = [int(side) for side in said["shape"]], int(said["blocksize"])
        nested = (int(said["nested_blocksize"]), float(said["nested_offset"])) if NESTED[0] in parts else None
    except (ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"its quant_state cannot be read ({type(error).__name__})") from None
    scales, table, codes = parts[".absmax"].flatten(), parts[".quant_map"].float(), parts[""].flatten()
    if nested and NESTED[1] in parts:
        block, offset = nested
        if block < 1 or len(parts[NESTED[1]]) != 256 or scales.dtype != torch.uint8:
            raise Unreadable("its scales of scales do not fit its scales")
        scales = _blockwise(parts[NESTED[1]].float()[scales.long()], parts[NESTED[0]].float(), block) + offset
    count = math.prod(shape)
    if size < 1 or not shape or min(shape) < 1 or len(codes) != -(-count // 2) or len(table) != 16:
        raise Unreadable(f"{len(codes)} bytes and a table of {len(table)} numbers do not hold a weight of {shape}")
    pairs = torch.stack([codes >> 4, codes & 15], -1).flatten()[:count]
    return finite(_blockwise(table[pairs.long()], scales.float(), size)).reshape(shape)


def _blockwise(numbers: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    if len(scales) != -(-len(numbers) // size):
        raise Unreadable(f"{len(scales)} scales for {len(numbers)} codes, which have blocks of {size}")
    return numbers * scales.repeat_interleave(size)[: len(numbers)]


def _eight_bits(parts: Parts) -> torch.Tensor:
    codes, scales = parts["weight"], parts["SCB"]
    if codes.dim() != 2 or scales.shape != codes.shape[:1]:
        raise Unreadable(f"SCB of the shape {list(scales.shape)} does not fit a weight of {list(codes.shape)}")
    order = parts.get("weight_format")
    if order is not None and not order.is_meta and int(order.item()) != 0:
        raise Unreadable("its weight_format is not by rows; older bitsandbytes wrote it for some GPUs")
    return finite(codes * scales.float()[:, None] * INVERSE)
