"""The shared parts of causal language modelling: collation, the loss with its rows, and the held-out figures.

Shapes: R rows of a micro-batch, B sequences, T positions, N supervised tokens.
Packed: B is 1 and the rows follow each other. Padded: B is R, filled up on the right.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.data.batches import Batch
from finetune.data.example import Example
from finetune.model.losses import TokenLosses
from finetune.plan.facts import Metrics
from finetune.tasks.task import RowResults


def collate_packed(examples: Sequence[Example]) -> Batch:
    """One sequence; positions restart with every row, and attention finds the rows by `row_bounds` and `cu_seq_lens`."""
    lengths = [len(example.tokens) for example in examples]
    bounds = [0, *accumulate(lengths)]
    positions = np.concatenate([np.arange(length) for length in lengths])
    # Embeddings want int64. The cache has int32, for half the disk.
    tokens = np.concatenate([example.tokens for example in examples], dtype=np.int64)
    model_inputs = {
        "input_ids": torch.from_numpy(tokens[None]),
        "position_ids": torch.from_numpy(positions[None]),
        "row_bounds": bounds,  # for the host: to read them from a device would wait for it
        "cu_seq_lens": torch.from_numpy(np.array(bounds, dtype=np.int32)),
    }
    return {"model_inputs": model_inputs, **_supervised(examples, tokens, bounds[:-1])}


def filled(batch: Batch, size: int) -> Batch:
    """A packed batch with rows of zeros after its own, up to `size` tokens. Nothing in them is supervised; none is longer than its own."""
    inputs = batch["model_inputs"]
    bounds, longest = inputs["row_bounds"], int(inputs["position_ids"].max()) + 1
    more = [*range(bounds[-1] + longest, size, longest), size] if size > bounds[-1] else []
    places = np.arange(size - bounds[-1]) % longest
    inputs = inputs | {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, len(places))),
        "position_ids": torch.cat([inputs["position_ids"], torch.from_numpy(places[None])], dim=1),
        "row_bounds": [*bounds, *more],
        "cu_seq_lens": torch.tensor([*bounds, *more], dtype=torch.int32),
    }
    return {**batch, "model_inputs": inputs}


def collate_padded(examples: Sequence[Example]) -> Batch:
    """A sequence a row, filled up on the right. It needs no mask: in a causal model no real token sees what is on its right."""
    longest = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), longest), dtype=np.int64)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
    firsts = range(0, tokens.size, longest)
    return {
        "model_inputs": {"input_ids": torch.from_numpy(tokens)},
        **_supervised(examples, tokens.reshape(-1), firsts),
    }


def _supervised(examples: Sequence[Example], tokens: np.ndarray, firsts: Sequence[int]) -> Batch:
    """The places among B * T that predict a supervised token, and these tokens; `firsts` are the places where rows begin."""
    # The mask is shifted by one: position t predicts token t + 1, and nothing predicts the first token.
    targets = [np.flatnonzero(example.supervised[1:]) for example in examples]
    positions = np.concatenate([target + first for target, first in zip(targets, firsts, strict=True)])
    return {
        "positions_N": torch.from_numpy(positions),
        "labels_N": torch.from_numpy(tokens[positions + 1]),
        "tokens_of_rows": [len(target) for target in targets],
    }


def loss(model: PreTrainedModel, batch: Batch, token_losses: TokenLosses) -> tuple[Tensor, Tensor]:
    """The summed loss in nats (fp32 scalar) and the sum of each row (fp32, shape (R,)); only the first is differentiable."""
    loss_sum, losses_N = token_losses(model, batch["model_inputs"], batch["positions_N"], batch["labels_N"])
    # split, not index_add: scattered sums are not deterministic on a GPU
    rows_R = torch.stack([part.sum() for part in losses_N.detach().split(batch["tokens_of_rows"])])
    return loss_sum, rows_R


def score(results: RowResults) -> Metrics:
    """Held-out figures: mean loss in nats a supervised token, its standard error, and its perplexity.

    The error is that of a ratio of two sums over rows, drawn at random with all their tokens (Cochran, Sampling Techniques, 1977, section
    6.4; for evaluations: Miller 2024, arXiv 2411.00640); one row has none.
    """
    # As Python floats, for `fsum`: its sum does not depend on the order of rows.
    row_sums, row_tokens = results.sums.tolist(), results.tokens
    rows, tokens = len(row_sums), int(row_tokens.sum())
    mean = math.fsum(row_sums) / tokens
    # exp(710) overflows.
    figures = {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "rows": rows, "tokens": tokens}
    # With one row there is no spread to estimate an error from.
    if rows > 1 and math.isfinite(mean):
        deviations = np.array(row_sums) - mean * row_tokens
        figures["loss_stderr"] = math.sqrt(rows / (rows - 1) * math.fsum(deviations**2)) / tokens
    return figures
