"""Floor 1. Conversations to examples; the loss is on what the assistant says and on the token that ends its turn.

A row holds `messages`, or `prompt` and `completion` (text, or lists of messages). Spans are found by rendering each
conversation up to a turn and as a whole, so any template works whose renderings are prefixes of one another.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune import chat_template
from finetune.errors import DataError
from finetune.example import Example
from finetune.plan import ROW_RULES
from finetune.recipe.schema import ChatTask

Encode = Callable[[Sequence[dict], Sequence[str]], list[list[Example]]]

TEMPLATE_HINT = "give a chat template of your own with task.template: FILE"


class Conversation(NamedTuple):
    messages: list[dict]
    given: int
    """So many messages at the start are given: their assistant turns are not learnt (`prompt` and `completion` rows)."""


def encoder(
    tokenizer: PreTrainedTokenizerBase, task: ChatTask, stop_tokens: Collection[int], row_rules: int = ROW_RULES
) -> Encode:
    """A function from rows and their places to the one example of each row.

    `stop_tokens` are the ids that end generation: each assistant turn must end with one, or the tuned model would not stop.
    """
    template = template_of(tokenizer, task)

    def encode(rows: Sequence[dict], places: Sequence[str]) -> list[list[Example]]:
        conversations = [conversation_of(row, place) for row, place in zip(rows, places, strict=True)]
        _refuse_control_tokens(conversations, places, tokenizer)
        rendered = [_render(tokenizer, template, *pair) for pair in zip(conversations, places, strict=True)]
        batch = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
        examples = []
        for number, (text, spans) in enumerate(rendered):
            tokens = np.array(batch["input_ids"][number], dtype=np.int32)
            supervised = np.zeros(len(tokens), dtype=bool)
            starts, ends = np.array(batch["offset_mapping"][number], dtype=np.int64).reshape(-1, 2).T
            for first, last in spans:
                # a token that header and answer share counts, or the answer's first word would never be learnt
                turn = np.flatnonzero((ends > first) & (starts < last))
                turn = turn[: _without_trailing_space(turn, starts, ends, text)]
                if not len(turn) or tokens[turn[-1]] not in stop_tokens:
                    raise _no_stop_token(tokenizer, tokens[turn[-1:]], stop_tokens, places[number])
                supervised[turn] = True
            cut = max(0, len(tokens) - task.max_length)
            examples.append([Example(tokens[: task.max_length], supervised[: task.max_length], cut)])
        return examples

    return encode


def template_of(tokenizer: PreTrainedTokenizerBase, task: ChatTask) -> str:
    """The chat template in force: the recipe's file, or the base's own."""
    if task.template is not None:
        try:
            template = Path(task.template).read_text()
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror}", where=task.template, hint="task.template names a file"
            ) from None
        if problem := chat_template.problem(template):
            raise DataError(f"the template {problem}", where=task.template, hint="mend it, or use the base's own")
        return template
    if not tokenizer.chat_template:
        raise DataError("the base has no chat template", hint=TEMPLATE_HINT)
    return tokenizer.chat_template


def conversation_of(row: dict, place: str) -> Conversation:
    """The messages of a row, checked."""
    if row.get("messages") is not None:
        conversation = Conversation(_messages(row["messages"], "messages", place), 0)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        given = _messages(asked, "prompt", place)
        conversation = Conversation(given + _messages(answer, "completion", place), len(given))
    else:
        present = ", ".join(sorted(row)) or "none"
        raise DataError(
            f"has neither `messages` nor `prompt` and `completion`; its columns are: {present}",
            where=place,
            hint="map columns with data.train[].columns, like {messages: conversations}",
        )
    if conversation.messages[0]["role"] == "assistant":
        raise DataError("begins with an assistant turn, which answers nothing", where=place, hint="remove the turn")
    turns = [message for message in conversation.messages[conversation.given :] if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            "has no assistant turn, so there is nothing to learn from it", where=place, hint="remove the row"
        )
    if not all(turn["content"].strip() for turn in turns):
        raise DataError("has an empty assistant turn", where=place, hint="remove the row")
    return conversation


def _messages(messages: object, column: str, place: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`{column}` must be a list of messages, each with `role` and `content`", where=place)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"`{column}[{number}]` must have a `role`", where=place)
        if not isinstance(message.get("content"), str):
            raise DataError(f"`{column}[{number}]` must have a `content` that is text", where=place)
    return messages


def _refuse_control_tokens(
    conversations: list[Conversation], places: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Text that spells a control token would become that token, and end or forge a turn."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for conversation, place in zip(conversations, places, strict=True):
        for message in conversation.messages:
            for token in control:
                if token in message["content"]:
                    raise DataError(
                        f"a {message['role']} message spells the control token `{token}`",
                        where=place,
                        hint="remove or respell it",
                    )


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation, place: str
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and the span in characters of each assistant turn to learn, from after its header to its end."""
    messages = conversation.messages

    def render(count: int, with_header: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], chat_template=template, tokenize=False, add_generation_prompt=with_header
        )

    spans = []
    try:
        text = render(len(messages))
        for number in range(conversation.given, len(messages)):
            if messages[number]["role"] == "assistant":
                before = render(number, with_header=True)
                through = render(number + 1) if number + 1 < len(messages) else text
                if not (text.startswith(before) and text.startswith(through)):
                    raise DataError(
                        "the chat template renders a turn differently once others follow, so assistant tokens cannot be told apart",
                        where=place,
                        hint=TEMPLATE_HINT,
                    )
                spans.append((len(before), len(through)))
    except jinja2.TemplateError as error:
        raise DataError(
            f"the chat template refuses the row: {error}", where=place, hint="look at the order of roles in it"
        ) from None
    return text, spans


def _without_trailing_space(turn: np.ndarray, starts: np.ndarray, ends: np.ndarray, text: str) -> int:
    """How many tokens of the turn remain without the blanks that a template writes after the stop token."""
    count = len(turn)
    while count and not text[starts[turn[count - 1]] : ends[turn[count - 1]]].strip():
        count -= 1
    return count


def _no_stop_token(
    tokenizer: PreTrainedTokenizerBase, last: np.ndarray, stop_tokens: Collection[int], place: str
) -> DataError:
    ending = tokenizer.decode(last) if len(last) else "nothing"
    stops = ", ".join(f"`{tokenizer.decode([token])}`" for token in sorted(stop_tokens)) or "none"
    return DataError(
        f"the chat template ends the assistant's turn with `{ending}`, not with a stop token ({stops}): the tuned model would not stop",
        where=place,
        hint=TEMPLATE_HINT,
    )
