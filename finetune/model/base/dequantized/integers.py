"""Weights in integers, with scales and zero points of groups: GPTQ, AWQ and compressed-tensors."""

from functools import partial

import torch

from finetune.model.base.dequantized.layouts import Block, Layout, Parts, Unreadable, product, spread

WORD = 32  # bits
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of columns 0 to 7 lie in a word


def gptq(bits: int, zero_shift: int) -> Layout:
    """Codes packed along the input of a weight (in, out), zero points along its output; `g_idx` has the group of each input.

    AutoGPTQ's first format stores zero points less one, so `zero_shift` is 1; `gptq_v2` stores them as they are. Frantar et al. 2022, arXiv 2210.17323.
    """
    needed, decode = ("qzeros", "scales"), partial(_gptq, bits, zero_shift)
    return Layout("qweight", ("I32",), needed, decode, optional=("g_idx",), weight="weight")


def awq() -> Layout:
    """Eight 4-bit codes of a row of a weight (in, out) in a word, interleaved. Lin et al. 2023, arXiv 2306.00978; AutoAWQ's `gemm`."""
    return Layout("qweight", ("I32",), ("qzeros", "scales"), _awq, weight="weight")


def packed(bits: int, blocks: tuple[Block, ...]) -> Layout:
    """compressed-tensors' `pack-quantized`: codes of a row without gaps, and half of their range above zero."""
    needed, decode = ("weight_scale", "weight_shape"), partial(_packed, bits, blocks)
    return Layout("weight_packed", ("I32",), needed, decode, ("weight_zero_point",), weight="weight", has_shape=False)


def int8(blocks: tuple[Block, ...]) -> Layout:
    """compressed-tensors' `int-quantized`: signed bytes."""
    return Layout("weight", ("I8",), ("weight_scale",), partial(_int8, blocks), ("weight_zero_point",), weight="weight")


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` unsigned codes along the last side of int32 words, from their low bits on; a code may cross words."""
    if words.shape[-1] != -(-count * bits // WORD):
        raise Unreadable(f"{words.shape[-1]} words of 32 bits hold other than {count} codes of {bits} bits")
    if words.is_meta:
        return torch.empty(*words.shape[:-1], count, device="meta")
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :count].float()
    wide = words.to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(count, device=words.device) * bits
    word, shift = start // WORD, start % WORD
    after = (word + 1).clamp(max=words.shape[-1] - 1)
    both = wide[..., word] | (wide[..., after] << WORD)  # the upper half is read only by codes that cross
    return ((both >> shift) & (2**bits - 1)).float()


def _gptq(bits: int, zero_shift: int, parts: Parts) -> torch.Tensor:
    groups, outputs = _two(parts["scales"], "scales")
    inputs = parts["qweight"].shape[0] * WORD // bits
    codes = unpacked(parts["qweight"].T, bits, inputs).T
    zeros = unpacked(parts["qzeros"], bits, outputs) + zero_shift
    if codes.shape[1] != outputs or zeros.shape[0] != groups or inputs % groups:
        raise Unreadable(f"scales of the shape {[groups, outputs]} do not fit codes of {list(codes.shape)}")
    group = torch.arange(inputs, device=codes.device) // (inputs // groups)
    if "g_idx" in parts and not codes.is_meta:
        group = parts["g_idx"].long()
        if group.shape != (inputs,) or not bool(((0 <= group) & (group < groups)).all()):
            raise Unreadable(f"g_idx does not name one of {groups} groups for each of {inputs} inputs")
    return product(codes - zeros[group], parts["scales"].float()[group]).T.contiguous()


def _awq(parts: Parts) -> torch.Tensor:
    groups, outputs = _two(parts["scales"], "scales")
    codes, zeros = (_in_order(unpacked(parts[name], 4, outputs)) for name in ("qweight", "qzeros"))
    inputs = codes.shape[0]
    if zeros.shape[0] != groups or inputs % groups or outputs % len(AWQ_ORDER):
        raise Unreadable(f"scales of the shape {[groups, outputs]} do not fit codes of {list(codes.shape)}")
    each = inputs // groups
    spread_zeros, scales = (one.float().repeat_interleave(each, 0) for one in (zeros, parts["scales"]))
    return product(codes - spread_zeros, scales).T.contiguous()


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    return codes.unflatten(-1, (-1, len(AWQ_ORDER)))[..., list(AWQ_ORDER)].flatten(-2)


def _packed(bits: int, blocks: tuple[Block, ...], parts: Parts) -> torch.Tensor:
    shape = torch.Size(parts["weight_shape"].tolist())
    if shape[:-1] != parts["weight_packed"].shape[:-1]:
        raise Unreadable(f"weight_shape {list(shape)} does not fit codes of {list(parts['weight_packed'].shape)}")
    codes = unpacked(parts["weight_packed"], bits, shape[-1])
    scales = spread(parts["weight_scale"], shape, blocks)
    half, zeros = 2 ** (bits - 1), parts.get("weight_zero_point")
    if zeros is None:
        return product(codes - half, scales)
    # packed along rows
    each = unpacked(zeros.transpose(-1, -2), bits, shape[-2]).transpose(-1, -2)
    return product(codes - spread(each, shape, blocks), scales)


def _int8(blocks: tuple[Block, ...], parts: Parts) -> torch.Tensor:
    codes, zeros = parts["weight"].float(), parts.get("weight_zero_point")
    if zeros is not None:
        codes = codes - spread(zeros, codes.shape, blocks)
    return product(codes, spread(parts["weight_scale"], codes.shape, blocks))


def _two(tensor: torch.Tensor, name: str) -> torch.Size:
    if tensor.dim() != 2 or not all(tensor.shape):
        raise Unreadable(f"{name} have the shape {list(tensor.shape)}, and are of groups and outputs")
    return tensor.shape
