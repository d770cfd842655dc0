"""What a task is: how rows become examples, examples a batch, a batch a loss, and losses figures.

Its keys, and what is known of it without torch, are its section in `recipe/schema/tasks.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from finetune.data.batches import Batch
from finetune.data.example import Encoder, Example, Row
from finetune.model.losses import TokenLosses
from finetune.plan.facts import Metrics


class RowResults(NamedTuple):
    """What an evaluation finds for each row; a task reduces it to figures."""

    rows: np.ndarray
    """The row of each example, counted through the sources, int64 (N,)."""
    sums: np.ndarray
    """The summed loss of each example in nats, float64 (N,); with more columns where the task's loss gives more."""
    tokens: np.ndarray
    """Supervised tokens of each example, int64 (N,)."""


class Explained(NamedTuple):
    """An example before it is cut, with a reason for each token."""

    text: str
    tokens: np.ndarray
    """Token ids, int32 (T,)."""
    offsets: np.ndarray
    """First and last character of each token in `text`, int64 (T, 2)."""
    supervised: np.ndarray
    """Loss mask, bool (T,)."""
    reasons: Sequence[str]
    """Why each token is or is not learnt, one short sentence each."""
    kept: int
    """Tokens that remain after cutting."""


# a row and its place in, the examples of the row out
Explain = Callable[[Row, str], list[Explained]]


@dataclass(frozen=True)
class Task:
    encoder: Callable[..., Encoder]
    """(tokenizer, section, stop tokens, row rules, and how conversations are rendered) -> a function from rows and their places to the
    examples of each row. What the loss needs beside tokens, like a label, is in `Example.numbers`."""
    content: Callable[[Row], object]
    """A row -> what it says, as JSON has it: by this it is held out, and found again in other files."""
    collate_packed: Callable[[Sequence[Example]], Batch]
    collate_padded: Callable[[Sequence[Example]], Batch]
    """Examples -> the arguments of `loss`, on the CPU."""
    loss: Callable[[PreTrainedModel, Batch, TokenLosses], tuple[Tensor, Tensor]]
    """(model, batch, token losses) -> loss sum and row sums. The sums are over what examples call supervised, and are divided by how many
    there are in a step."""
    score: Callable[[RowResults], Metrics]
    """Row results -> held-out figures; of them `loss`, the lower the better, chooses the best checkpoint."""
    template_of: Callable[..., str] | None = None
    """(tokenizer, section, whether a text is the one that is looked for) -> the chat template in force, where rows are conversations; their
    section has the key `template`."""
    explained: Callable[..., Explain] | None = None
    """As `encoder`, for one row at a time: its examples with a reason for each token."""
