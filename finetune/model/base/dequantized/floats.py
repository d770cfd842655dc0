"""Weights in small floats: fp8 (E4M3) and fp4 (E2M1), with scales of blocks."""

from functools import partial

import torch

from finetune.model.base.dequantized.layouts import Block, Layout, Parts, Unreadable, product, spread

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SIXTEEN = (Block(1, 16),)
THIRTY_TWO = (Block(1, 32),)


def fp8(scale: str, blocks: tuple[Block, ...]) -> Layout:
    """E4M3 codes under the weight's own name, and scales to multiply with under `scale`.

    With `_scale_inv` and blocks of 128 x 128 these are the files of DeepSeek-V3 (arXiv 2412.19437, section 3.3).
    """
    return Layout("", ("F8_E4M3",), (scale,), partial(_fp8, scale, blocks))


def nvfp4(codes: str, scale: str, whole: str, *, is_divided: bool) -> Layout:
    """Two E2M1 codes in a byte, the first in its low bits; an E4M3 scale for every 16, and an fp32 scale of the whole weight.

    NVIDIA's ModelOpt multiplies with the latter; compressed-tensors stores its inverse.
    """
    return Layout(codes, ("U8",), (scale, whole), partial(_nvfp4, codes, scale, whole, is_divided), weight="weight")


def mxfp4(codes: str, scale: str) -> Layout:
    """As NVFP4, but a scale is a power of two for every 32: the exponent in a byte (OCP Microscaling Formats 1.0)."""
    return Layout(codes, ("U8",), (scale,), partial(_mxfp4, codes, scale), weight="weight")


def _fp8(scale: str, blocks: tuple[Block, ...], parts: Parts) -> torch.Tensor:
    codes = parts[""].float()
    return product(codes, spread(_floats(parts[scale]), codes.shape, blocks))


def _nvfp4(codes: str, scale: str, whole: str, is_divided: bool, parts: Parts) -> torch.Tensor:
    if parts[whole].numel() != 1:
        raise Unreadable(f"{whole} has the shape {list(parts[whole].shape)}, and is one number for the whole weight")
    numbers, factor = _fp4(parts[codes]), parts[whole].float().reshape(1, 1)
    scales = _floats(parts[scale]).float()
    return product(numbers, spread(scales / factor if is_divided else scales * factor, numbers.shape, SIXTEEN))


def _mxfp4(codes: str, scale: str, parts: Parts) -> torch.Tensor:
    numbers = _fp4(parts[codes])
    if parts[scale].dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise Unreadable(f"its scales are {str(parts[scale].dtype).removeprefix('torch.')}, and are bytes")
    scales = (parts[scale].view(torch.uint8).float() - 127).exp2()
    return product(numbers, spread(scales, numbers.shape, THIRTY_TWO))


def _fp4(codes: torch.Tensor) -> torch.Tensor:
    """(…, columns / 2) bytes to (…, columns) numbers."""
    table = torch.tensor(FP4, device=codes.device)
    pairs = torch.stack([codes & 15, codes >> 4], -1)
    return table[pairs.flatten(-2).long()]


def _floats(scales: torch.Tensor) -> torch.Tensor:
    if not scales.dtype.is_floating_point:
        raise Unreadable(f"its scales are {str(scales.dtype).removeprefix('torch.')}, and are floats")
    return scales
