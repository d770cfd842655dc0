"""The functions of a task: rows to examples, examples to a batch, a batch to a loss, and losses to figures.

Its section in `recipe/schema/tasks.py` has its keys, and its facts without torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from finetune.data.batches import Batch
from finetune.data.example import Encoder, Example, Row
from finetune.model.losses import TokenLosses
from finetune.plan.facts import Metrics
from finetune.store.evaluations import Measure


class RowResults(NamedTuple):
    """The results of an evaluation for each row; a task reduces them to figures."""

    rows: np.ndarray
    """The row of each example, counted through the sources, int64 (N,)."""
    sums: np.ndarray
    """The summed loss of each example in nats, float64 (N,); with more columns if the task's loss gives more."""
    tokens: np.ndarray
    """Supervised tokens of each example, int64 (N,)."""


Encode = Callable[[Sequence[Row], Sequence[str]], list[list[Example]]]
"""Rows and their places -> the examples of each row."""


@dataclass(frozen=True)
class Explained:
    """One example of a row before it is cut to `max_length`, with the reason for the mask of each token."""

    text: str
    tokens: np.ndarray
    """Token ids, int32, (T,)."""
    offsets: np.ndarray
    """The characters that each token stands for, int64, (T, 2)."""
    supervised: np.ndarray
    """Whether its loss counts, bool, (T,)."""
    reasons: list[str]
    """Why, a sentence a token."""
    kept: int
    """Tokens that are left after the cut."""


Explain = Callable[[Row, str], list[Explained]]
"""A row and its place -> its examples, explained."""

Ask = Callable[[Row, str], list[int]]
"""A row and its place -> the token ids after which a model answers it."""


@dataclass(frozen=True)
class Task:
    encoder: Callable[..., Encoder]
    """(tokenizer, section, stop tokens, row rules, and how conversations are rendered) -> a function from rows and their places to the
    examples of each row. `Example.numbers` has what the loss needs beside tokens, like a label."""
    content: Callable[[Row], object]
    """A row -> its content, as JSON. It decides whether the row is held out, and finds it again in other files."""
    collate_packed: Callable[[Sequence[Example]], Batch]
    collate_padded: Callable[[Sequence[Example]], Batch]
    """Examples -> the arguments of `loss`, on the CPU."""
    loss: Callable[[PreTrainedModel, Batch, TokenLosses], tuple[Tensor, Tensor]]
    """(model, batch, token losses) -> loss sum and row sums. The sums are over supervised tokens; the loop divides by their
    number in the step."""
    score: Callable[[RowResults], Metrics]
    """Row results -> held-out figures; their `loss` chooses the best checkpoint; lower is better."""
    template_of: Callable[..., str] | None = None
    """(tokenizer, section, whether a text is the one that is looked for) -> the chat template in force, where rows are conversations; their
    section has the key `template`."""
    explainer: Callable[..., Explain] | None = None
    """The arguments of `encoder` -> a function that says of each token why it is learnt or not, for people who look at rows. None: the mask
    of an example says it all."""
    asker: Callable[..., Ask] | None = None
    """The arguments of `encoder` -> a function to what a model is given when it is asked for the last learnt turn of a row, or for the rest
    of its text. None: the task's models write nothing."""
    measures: Mapping[str, Measure] = field(default_factory=lambda: {"loss": {"per": "tokens", "better": "lower"}})
    """What the columns of `RowResults.sums` measure, in their order. An evaluation keeps each of them for each row."""
