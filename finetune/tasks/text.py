"""Plain text to examples: every token is supervised, and a long row becomes several examples, nothing lost.

A row may be tokens already. Then nothing is added, and its own mask says which are supervised.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.example import Example, Row
from finetune.data.plain_text import Tokens, content_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES
from finetune.recipe.schema import TextTask
from finetune.tasks import causal, content
from finetune.tasks.task import Ask, Task

Encode = Callable[[Sequence[Row], Sequence[str]], list[list[Example]]]


def encoder(
    tokenizer: PreTrainedTokenizerBase, task: TextTask, stop_tokens: Collection[int], row_rules: int = ROW_RULES
) -> Encode:
    """A function from rows and their places to the examples of each row; each text ends with the tokenizer's end token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the base's tokenizer has no end-of-text token", hint="choose a base that has one")

    def encode(rows: Sequence[Row], places: Sequence[str]) -> list[list[Example]]:
        given = [content_of(row, place, row_rules) for row, place in zip(rows, places, strict=True)]
        of_texts = iter(encode_texts([each for each in given if isinstance(each, str)]))
        return [
            next(of_texts) if isinstance(each, str) else _of_tokens(each, place, len(tokenizer), task.max_length)
            for each, place in zip(given, places, strict=True)
        ]

    def encode_texts(texts: list[str]) -> list[list[Example]]:
        if not texts:
            return []
        # All texts in one call: a fast tokenizer spreads them over its threads.
        found, added = _ids(tokenizer, texts)
        # A run of older rules keeps its doubled tokens: its resume must train on the same ones.
        if row_rules > 1:
            found = [_once(*pair) for pair in zip(found, added, strict=True)]
        # some tokenizers end every text themselves
        ended = [ids if ids[-1:] == [end] else [*ids, end] for ids in found]
        return [_divided(ids, task.max_length) for ids in ended]

    return encode


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of each text, and 1 for each that the tokenizer adds. Without the characters of tokens, which take a fifth of the time."""
    first = tokenizer(texts[0])["input_ids"]  # this also turns off a truncation that tokenizer.json may ask for
    fast = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    if fast[0].ids == first:
        return [each.ids for each in fast], [each.special_tokens_mask for each in fast]
    # Its class does more than its tokenizer.json says.
    batch = tokenizer(texts, return_special_tokens_mask=True)
    return batch["input_ids"], batch["special_tokens_mask"]


def _of_tokens(tokens: Tokens, place: str, vocabulary: int, max_length: int) -> list[Example]:
    """The examples of a row that is tokens already."""
    _refuse_unknown(tokens, place, vocabulary)
    supervised = np.array(tokens.supervised, dtype=bool)
    pieces, start = _divided(tokens.ids, max_length), 0
    examples = []
    for piece in pieces:
        examples.append(piece._replace(supervised=supervised[start : start + len(piece.tokens)]))
        start += len(piece.tokens) - 1  # the last token of a piece begins the next one
    return examples


def _refuse_unknown(tokens: Tokens, place: str, vocabulary: int) -> None:
    if (largest := max(tokens.ids)) >= vocabulary:
        message = (
            f"`input_ids[{tokens.ids.index(largest)}]` is {largest}, and the base's tokenizer has {vocabulary} tokens"
        )
        raise DataError(message, where=place, hint="encode the rows with the tokenizer of this base")


def asker(
    tokenizer: PreTrainedTokenizerBase, task: TextTask, stop_tokens: Collection[int], row_rules: int = ROW_RULES
) -> Ask:
    """A function from a row and its place to the tokens of its text, to continue."""

    def ask(row: Row, place: str) -> list[int]:
        given = content_of(row, place, row_rules)
        if isinstance(given, str):
            return beginning(tokenizer, given)
        _refuse_unknown(given, place, len(tokenizer))
        return given.ids

    return ask


def beginning(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt to continue: as in training, and without the end token some tokenizers add."""
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    while len(ids) > 1 and added[-1]:
        ids, added = ids[:-1], added[:-1]
    return _once(ids, added)


def _once(ids: list[int], added: list[int]) -> list[int]:
    """Drops the tokenizer's begin and end tokens if the text has them already, as a text rendered before does.

    `added` is 1 for each token the tokenizer added.
    """
    before, after = (next((count for count, each in enumerate(way) if not each), 0) for way in (added, added[::-1]))
    if before and ids[before : 2 * before] == ids[:before] and not any(added[before : 2 * before]):
        ids, added = ids[before:], added[before:]
    end = len(ids) - after
    if after and ids[end - after : end] == ids[end:] and not any(added[end - after : end]):
        ids = ids[:end]
    return ids


def _divided(ids: list[int], max_length: int) -> list[Example]:
    """Pieces of at most `max_length` tokens. Each begins with the last token of the previous one, so every token is predicted."""
    tokens = np.array(ids, dtype=np.int32)
    starts = range(0, max(1, len(tokens) - 1), max(1, max_length - 1))
    return [Example(piece := tokens[start : start + max_length], np.ones(len(piece), dtype=bool)) for start in starts]


TASK = Task(
    encoder, content.of_text, causal.collate_packed, causal.collate_padded, causal.loss, causal.score, asker=asker
)
