"""Conversations to examples; the loss is on the assistant's text and on the token that ends its turn.

A conversation is one example, or one for each learnt turn: see `turns`.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.example import Example, Row
from finetune.data.shards import CHARACTERS_AT_ONCE
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES
from finetune.recipe.schema import ChatTask
from finetune.tasks import causal, content
from finetune.tasks.chat_rows import ChatRows
from finetune.tasks.chat_template import refuse_unread, template_of
from finetune.tasks.reasons import reasons_of, tolerant
from finetune.tasks.rendering import TEMPLATE_HINT, Renderer
from finetune.tasks.task import Ask, Encode, Explain, Explained, Task
from finetune.tasks.turns import Ends, Rendered


class _Tokens(NamedTuple):
    """One example before it is cut."""

    ids: np.ndarray
    """int32, (T,)."""
    starts: np.ndarray
    ends: np.ndarray
    """The characters that each token stands for, int64, (T,)."""
    supervised: np.ndarray
    """bool, (T,)."""


class Rendering(TypedDict, total=False):
    """How rows of a plan become text."""

    template: str | None
    """The chat template in force; without it, that of the recipe or the base."""
    date: str | None
    """What a template that prints the day is given."""
    allowed: Collection[str]
    """Gates that are open: `lost_text` and `unlearnt_stop`."""


def encoder(
    tokenizer: PreTrainedTokenizerBase,
    task: ChatTask,
    stop_tokens: Collection[int],
    row_rules: int = ROW_RULES,
    **rendering: Unpack[Rendering],
) -> Encode:
    """A function from rows and their places to the examples of each row.

    `stop_tokens` are the ids that end generation: each assistant turn must end with one, or the tuned model would not stop.
    """
    rows_of = _rows(tokenizer, task, stop_tokens, row_rules, **rendering)

    def encode(rows: Sequence[Row], places: Sequence[str]) -> list[list[Example]]:
        texts = [rows_of.rendered(*pair) for pair in zip(rows, places, strict=True)]
        found = iter(_tokens(tokenizer, rows_of, stop_tokens, texts, places))
        return [[_example(next(found), task.max_length) for _ in each] for each in texts]

    return encode


def explainer(
    tokenizer: PreTrainedTokenizerBase,
    task: ChatTask,
    stop_tokens: Collection[int],
    row_rules: int = ROW_RULES,
    **rendering: Unpack[Rendering],
) -> Explain:
    """A function from a row and its place to its examples before they are cut, each token with the reason why it is learnt or not."""
    rows_of = _rows(tokenizer, task, stop_tokens, row_rules, **rendering)

    def explain(row: Row, place: str) -> list[Explained]:
        texts = rows_of.rendered(row, place)
        conversation = rows_of.conversation(row, place)
        through = tolerant(partial(rows_of.through, conversation))
        found = _tokens(tokenizer, rows_of, stop_tokens, [texts], [place])
        explained = []
        for one, tokens in zip(texts, found, strict=True):
            offsets = np.stack([tokens.starts, tokens.ends], axis=1)
            reasons = reasons_of(conversation, one, through, offsets, tokens.supervised, task.learn)
            kept = min(len(tokens.ids), task.max_length)
            explained.append(Explained(one.text, tokens.ids, offsets, tokens.supervised, reasons, kept))
        return explained

    return explain


def asker(
    tokenizer: PreTrainedTokenizerBase,
    task: ChatTask,
    stop_tokens: Collection[int],
    row_rules: int = ROW_RULES,
    **rendering: Unpack[Rendering],
) -> Ask:
    """A function from a row and its place to the tokens before its last learnt turn."""
    rows_of = _rows(tokenizer, task, stop_tokens, row_rules, **rendering)

    def ask(row: Row, place: str) -> list[int]:
        return list(tokenizer(rows_of.asked(row, place), add_special_tokens=False)["input_ids"])

    return ask


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    task: ChatTask,
    stop_tokens: Collection[int],
    row_rules: int,
    **rendering: Unpack[Rendering],
) -> ChatRows:
    template = rendering.get("template") or template_of(tokenizer, task)
    renderer = Renderer(tokenizer, template, rendering.get("date"))
    refuse_unread(renderer.template, task.template_variables)
    added = tokenizer.added_tokens_decoder.items()
    # Text becomes an added token even if that is not special. One that ends a turn would end it there.
    control = [token.content for number, token in added if token.special or (row_rules > 1 and number in stop_tokens)]
    stops = [text for token in sorted(stop_tokens) if (text := str(tokenizer.decode([token])))]
    return ChatRows(task, renderer, Ends(stops, control), row_rules, frozenset(rendering.get("allowed", ())))


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    rows_of: ChatRows,
    stop_tokens: Collection[int],
    texts: Sequence[Sequence[Rendered]],
    places: Sequence[str],
) -> Iterator[_Tokens]:
    """All examples of all rows."""
    pairs = [(one, place) for each, place in zip(texts, places, strict=True) for one in each]
    before = None
    for (one, place), (ids, offsets) in zip(pairs, _ids(tokenizer, [one.text for one, _ in pairs]), strict=True):
        starts, ends = offsets.T
        supervised = np.zeros(len(ids), dtype=bool)
        for field, (first, last) in zip(one.fields, one.spans, strict=True):
            # a token that header and answer share counts, or the answer's first word would never be learnt
            turn = np.flatnonzero((ends > first) & (starts < last))
            turn = turn[: _without_trailing_space(turn, starts, ends, one.text)]
            has_stop = len(turn) and ids[turn[-1]] in stop_tokens
            if not has_stop and "unlearnt_stop" not in rows_of.allowed:
                raise _no_stop_token(tokenizer, ids[turn[-1:]], stop_tokens, field, place)
            supervised[turn] = True
        if rows_of.task.learn == "all":
            # What two examples of a row have in common is learnt once.
            shared = os.path.commonprefix([one.text, before[0]]) if before and before[1] == place else ""
            supervised |= ends > len(shared)
        before = one.text, place
        yield _Tokens(ids, starts, ends, supervised)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids of each text, int32 (T,), and the characters of each, int64 (T, 2).

    Many texts a call, for the tokenizer's threads; but an example a turn repeats its conversation, and each character takes 100 bytes.
    """
    edges = accumulate(map(len, texts))
    for _, some in groupby(zip(texts, edges, strict=True), lambda each: each[1] // CHARACTERS_AT_ONCE):
        batch = tokenizer([text for text, _ in some], add_special_tokens=False, return_offsets_mapping=True)
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            yield np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _example(tokens: _Tokens, max_length: int) -> Example:
    cut = max(0, len(tokens.ids) - max_length)
    lost = int(tokens.supervised[max(1, max_length) :].sum())  # the first token of a row is never predicted
    return Example(tokens.ids[:max_length].copy(), tokens.supervised[:max_length].copy(), cut, lost)


def _without_trailing_space(turn: np.ndarray, starts: np.ndarray, ends: np.ndarray, text: str) -> int:
    """How many tokens of the turn remain without the blanks that a template writes after the stop token."""
    count = len(turn)
    while count and not text[starts[turn[count - 1]] : ends[turn[count - 1]]].strip():
        count -= 1
    return count


def _no_stop_token(
    tokenizer: PreTrainedTokenizerBase, last: np.ndarray, stop_tokens: Collection[int], field: str, place: str
) -> DataError:
    ending = tokenizer.decode(last) if len(last) else "nothing"
    stops = ", ".join(f"`{tokenizer.decode([token])}`" for token in sorted(stop_tokens)) or "none"
    return DataError(
        f"the chat template ends the turn `{field}` with `{ending}`, not with a stop token ({stops}): the tuned model would not stop",
        where=place,
        hint=f"name the token that ends a turn with task.stop, or {TEMPLATE_HINT}",
    )


TASK = Task(
    encoder,
    content.of_chat,
    causal.collate_packed,
    causal.collate_padded,
    causal.loss,
    causal.score,
    template_of,
    explainer,
    asker,
)
