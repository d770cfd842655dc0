"""What a task is: how rows become examples, examples a batch, a batch a loss, and losses figures.

Its keys, and what is known of it without torch, are its section in `recipe/schema/tasks.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    encoder: Callable
    """(tokenizer, section, stop tokens, row rules, and how conversations are rendered) -> a function from rows and their places to the
    examples of each row. What the loss needs beside tokens, like a label, is in `Example.numbers`."""
    content: Callable
    """A row -> what it says, as JSON has it: by this it is held out, and found again in other files."""
    collate_packed: Callable
    collate_padded: Callable
    """Examples -> the arguments of `loss`, on the CPU."""
    loss: Callable
    """(model, batch, token losses) -> loss sum and row sums. The sums are over what examples call supervised, and are divided by how many
    there are in a step."""
    score: Callable
    """(row sums, supervised tokens of each row) -> held-out figures; of them `loss`, the lower the better, chooses the best checkpoint."""
    template_of: Callable | None = None
    """(tokenizer, section, whether a text is the one that is looked for) -> the chat template in force, where rows are conversations; their
    section has the key `template`."""
