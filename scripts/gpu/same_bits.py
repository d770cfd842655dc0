"""Kernels against fp64 and against themselves, and copies for saves: `same_bits.py ANSWER`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from finetune.model import attention, losses
from finetune.training.saving.buffers import Staging

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
# query heads, key heads, head size, window
ATTENTION = {
    "llama-8b": (32, 8, 128, None),
    "smollm2": (9, 3, 64, None),
    "odd": (8, 2, 20, None),
    "window": (8, 2, 64, 100),
}
TOKENS = 2048 if IS_GPU else 64
TOLERANCE = 1e-2  # of the norm: roundings within FlashAttention, emulated on a CPU, make 0.0016 to 0.0035
TURNS = 8 if IS_GPU else 2


def difference(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.double().cpu(), reference.double().cpu()
    return float((ours - reference).norm() / reference.norm())


def have_same_bits(compute: Callable[[], list[Tensor]]) -> bool:
    first, *others = (compute() for _ in range(TURNS))
    return all(torch.equal(one, other) for each in others for one, other in zip(first, each, strict=True))


def attended(shape: tuple, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of packed attention over rows of very different lengths."""
    heads, key_heads, size, window = shape
    bounds = [0, TOKENS // 4, TOKENS // 4 + 1, TOKENS // 2, TOKENS]
    generator = torch.Generator().manual_seed(1)
    draw = [
        torch.randn(1, count, TOKENS, size, generator=generator).bfloat16() for count in (heads, key_heads, key_heads)
    ]
    seed = torch.randn(1, TOKENS, heads, size, generator=generator).bfloat16()
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in draw]
    cu_seq_lens = torch.tensor(bounds, dtype=torch.int32, device=device)
    settings = {"row_bounds": bounds, "cu_seq_lens": cu_seq_lens, "sliding_window": window}
    output, _ = attention.per_row(torch.nn.Module(), *inputs, None, **settings)
    return [output.detach(), *torch.autograd.grad(output, inputs, seed.to(device, dtype))]


def of_attention() -> dict:
    found = {}
    for name, shape in ATTENTION.items():
        reference = attended(shape, torch.device("cpu"), torch.float64)
        ours = attended(shape, DEVICE, torch.bfloat16)
        differences = [difference(*pair) for pair in zip(ours, reference, strict=True)]
        is_same = have_same_bits(lambda shape=shape: attended(shape, DEVICE, torch.bfloat16))
        found[f"attention, {name}"] = {"differences": differences, "same_bits": is_same}
    return found


def of_loss() -> dict:
    vocabulary, hidden, tokens = (128256, 1024, 3000) if IS_GPU else (512, 64, 100)
    torch.manual_seed(2)
    states, weight = torch.randn(tokens, hidden, device=DEVICE), torch.randn(vocabulary, hidden, device=DEVICE) * 0.02
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def ours() -> list[Tensor]:
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss, _ = losses.LinearCrossEntropy.apply(*leaves, None, labels, 1.0, None)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, labels, reduction="sum")
    pairs = zip(ours(), [plain.detach(), *torch.autograd.grad(plain, leaves)], strict=True)
    return {"loss": {"differences": [difference(*pair) for pair in pairs], "same_bits": have_same_bits(ours)}}


def of_embedding() -> dict:
    """Many gradients for few rows, which atomic additions would sum in any order."""
    embedding = torch.nn.Embedding(1000, 256, device=DEVICE)
    tokens, seed = torch.randint(97, (8192,), device=DEVICE), torch.randn(8192, 256, device=DEVICE)
    gradient = lambda: list(torch.autograd.grad(embedding(tokens), [embedding.weight], seed))  # noqa: E731
    return {"embedding": {"differences": [], "same_bits": have_same_bits(gradient)}}


def of_staging() -> dict:
    """A copy for a save, from the device into page-locked memory of its exact size."""
    live = {f"weights/{number}": torch.randn(size, device=DEVICE) for number, size in enumerate((3, 5_000_001, 70_000))}
    copy = Staging().take(live)
    seconds = copy.wait()
    is_same = all(torch.equal(copy.tensors[name], tensor.cpu()) for name, tensor in live.items())
    return {"copy for a save": {"differences": [], "same_bits": is_same, "seconds": seconds}}


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = of_attention() | of_loss() | of_embedding() | of_staging()
    is_good = all(each["same_bits"] and max(each["differences"], default=0) <= TOLERANCE for each in found.values())
    Path(sys.argv[1]).write_text(json.dumps({"kernels": found, "is_good": is_good}))


if __name__ == "__main__":
    main()
