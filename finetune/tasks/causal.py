"""Floor 1. What all causal language modelling shares: collation, the loss with its rows, and the held-out figures.

Shapes: R rows of a micro-batch, B sequences, T positions, K positions whose logits are wanted, N supervised tokens,
V vocabulary. Packed: B is 1 and the rows stand one behind the other. Padded: B is R, filled up on the right.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from finetune.example import Example

TokenLosses = Callable[[Tensor, Tensor], Tensor]


def collate_packed(examples: Sequence[Example]) -> dict:
    """One sequence; positions restart with every row, and `row_bounds` tells attention where rows begin and end."""
    lengths = [len(example.tokens) for example in examples]
    bounds = [0, *np.cumsum(lengths).tolist()]
    positions = np.concatenate([np.arange(length) for length in lengths])
    targets = [np.flatnonzero(example.supervised[1:]) for example in examples]
    keep = np.concatenate([target + bound for target, bound in zip(targets, bounds, strict=False)])
    tokens = np.concatenate([example.tokens for example in examples])
    return {
        "model_inputs": {
            "input_ids": _tensor(tokens)[None],
            "position_ids": _tensor(positions)[None],
            "logits_to_keep": _tensor(keep),
            "row_bounds": bounds,
        },
        "sequence_N": torch.zeros(len(keep), dtype=torch.long),
        "kept_N": torch.arange(len(keep)),
        "labels_N": _tensor(tokens[keep + 1]),
        "tokens_of_rows": [len(target) for target in targets],
    }


def collate_padded(examples: Sequence[Example]) -> dict:
    """A sequence a row, filled up on the right, where a causal model never looks from a real token: no mask is needed."""
    longest = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), longest), dtype=np.int64)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
    targets = [np.flatnonzero(example.supervised[1:]) for example in examples]
    keep = np.unique(np.concatenate(targets))
    rows = np.repeat(np.arange(len(examples)), [len(target) for target in targets])
    columns = np.concatenate(targets)
    return {
        "model_inputs": {"input_ids": _tensor(tokens), "logits_to_keep": _tensor(keep)},
        "sequence_N": _tensor(rows),
        "kept_N": _tensor(np.searchsorted(keep, columns)),
        "labels_N": _tensor(tokens[rows, columns + 1]),
        "tokens_of_rows": [len(target) for target in targets],
    }


def loss(model: torch.nn.Module, batch: dict, token_losses: TokenLosses) -> tuple[Tensor, Tensor]:
    """The summed loss in nats (fp32 scalar) and the sum of each row (fp32, shape (R,)).

    Only the logits of supervised positions are computed, by the model's own head.
    """
    logits_BKV = model(**batch["model_inputs"], use_cache=False).logits
    logits_NV = logits_BKV[batch["sequence_N"], batch["kept_N"]]
    losses_N = token_losses(logits_NV, batch["labels_N"])
    # split, not index_add: scattered sums are not deterministic on a GPU
    rows_R = torch.stack([part.sum() for part in losses_N.split(batch["tokens_of_rows"])])
    return rows_R.sum(), rows_R


def score(loss_sum: float, tokens: int, rows: int) -> dict[str, float]:
    """Held-out figures: mean loss in nats a supervised token, and its perplexity."""
    mean = loss_sum / tokens
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "rows": rows, "tokens": tokens}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
