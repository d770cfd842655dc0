"""Plain text to examples: every token is supervised, and a long row becomes several examples, nothing lost."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.example import Example, Row
from finetune.data.plain_text import text_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES
from finetune.recipe.schema import TextTask
from finetune.tasks import causal, content
from finetune.tasks.task import Explain, Explained, Task

Encode = Callable[[Sequence[Row], Sequence[str]], list[list[Example]]]


def encoder(
    tokenizer: PreTrainedTokenizerBase, task: TextTask, stop_tokens: Collection[int], row_rules: int = ROW_RULES
) -> Encode:
    """A function from rows and their places to the examples of each row; each row ends with the tokenizer's end token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the base's tokenizer has no end-of-text token", hint="choose a base that has one")

    def encode(rows: Sequence[Row], places: Sequence[str]) -> list[list[Example]]:
        texts = [text_of(row, place) for row, place in zip(rows, places, strict=True)]
        batch = tokenizer(texts, return_special_tokens_mask=True)
        found = batch["input_ids"]
        if row_rules > 1:
            found = [_once(*pair) for pair in zip(found, batch["special_tokens_mask"], strict=True)]
        # some tokenizers end every text themselves
        ended = [ids if ids[-1:] == [end] else [*ids, end] for ids in found]
        return [_divided(ids, task.max_length) for ids in ended]

    return encode


def beginning(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a text that goes on: as in training, and without the end that some tokenizers write after every text."""
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    while len(ids) > 1 and added[-1]:
        ids, added = ids[:-1], added[:-1]
    return _once(ids, added)


def _once(ids: list[int], added: list[int]) -> list[int]:
    """Without what the tokenizer adds before and after a text that has it already: one that was rendered before begins with its begin token.

    `added` is 1 for each token that is not of the text.
    """
    before, after = (next((count for count, each in enumerate(way) if not each), 0) for way in (added, added[::-1]))
    if before and ids[before : 2 * before] == ids[:before] and not any(added[before : 2 * before]):
        ids, added = ids[before:], added[before:]
    end = len(ids) - after
    if after and ids[end - after : end] == ids[end:] and not any(added[end - after : end]):
        ids = ids[:end]
    return ids


def _divided(ids: list[int], max_length: int) -> list[Example]:
    """Stretches of at most `max_length` tokens; each begins with the last token of the one before, so that every token is predicted."""
    tokens = np.array(ids, dtype=np.int32)
    starts = range(0, max(1, len(tokens) - 1), max(1, max_length - 1))
    return [Example(piece := tokens[start : start + max_length], np.ones(len(piece), dtype=bool)) for start in starts]


def explained(
    tokenizer: PreTrainedTokenizerBase, task: TextTask, stop_tokens: Collection[int], row_rules: int = ROW_RULES
) -> Explain:
    """A function from a row and its place to its examples with reasons; nothing of a text is cut away."""
    encode = encoder(tokenizer, task, stop_tokens, row_rules)

    def explain(row: Row, place: str) -> list[Explained]:
        [examples] = encode([row], [place])
        return [_explained(tokenizer, example, number) for number, example in enumerate(examples)]

    return explain


def _explained(tokenizer: PreTrainedTokenizerBase, example: Example, number: int) -> Explained:
    texts = [str(tokenizer.decode([token])) for token in example.tokens.tolist()]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    first = "the first token of an example is never predicted"
    if number:
        first = "learnt at the end of the example before this one"
    reasons = [first, *["text: every token is learnt"] * (len(texts) - 1)]
    supervised = example.supervised.copy()
    supervised[0] = False
    offsets = np.stack([ends - [len(text) for text in texts], ends], axis=1)
    return Explained("".join(texts), example.tokens, offsets, supervised, reasons, len(texts))


TASK = Task(
    encoder,
    content.of_text,
    causal.collate_packed,
    causal.collate_padded,
    causal.loss,
    causal.score,
    explained=explained,
)
