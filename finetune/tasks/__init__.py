"""The tasks: how rows become examples, examples a batch, a batch a loss, and losses figures.

A new task is one file beside this one, a line in `TASKS`, and its section in `recipe/schema/tasks.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune.tasks import causal, chat, content, text


@dataclass(frozen=True)
class Task:
    encoder: Callable
    """(tokenizer, settings, stop tokens, row rules, and how conversations are rendered) -> a function from rows and their places to the
    examples of each row."""
    content: Callable
    """A row -> what it says, as JSON has it: by this it is held out, and found again in other files."""
    collate_packed: Callable
    collate_padded: Callable
    """Examples -> the arguments of `loss`, on the CPU."""
    loss: Callable
    """(model, batch, token losses) -> loss sum and row sums."""
    score: Callable
    """(loss sum, supervised tokens, rows) -> held-out figures; `loss` is the one that chooses the best checkpoint."""


def _causal(encoder: Callable, content: Callable) -> Task:
    return Task(encoder, content, causal.collate_packed, causal.collate_padded, causal.loss, causal.score)


TASKS = {"chat": _causal(chat.encoder, content.of_chat), "text": _causal(text.encoder, content.of_text)}
