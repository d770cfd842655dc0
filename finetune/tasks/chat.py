"""Conversations to examples; the loss is on the assistant's text and on the token that ends its turn.

It renders each conversation up to a turn and as a whole, so every template works if its renderings are prefixes of one another.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.completeness import refuse_lost
from finetune.data.conversation import ROLES, Conversation, arguments_of, conversation_of, with_text_arguments
from finetune.data.example import Example, Row
from finetune.errors import DataError
from finetune.model.base import templates
from finetune.model.base.files import TEMPLATE
from finetune.plan.plan import ROW_RULES
from finetune.recipe.schema import ChatTask
from finetune.store import places
from finetune.tasks import causal, content
from finetune.tasks.rendering import TEMPLATE_HINT, Renderer
from finetune.tasks.task import Explain, Explained, Task

Encode = Callable[[Sequence[Row], Sequence[str]], list[list[Example]]]


def encoder(
    tokenizer: PreTrainedTokenizerBase,
    task: ChatTask,
    stop_tokens: Collection[int],
    row_rules: int = ROW_RULES,
    template: str | None = None,
    date: str | None = None,
    allowed: Collection[str] = (),
) -> Encode:
    """A function from rows and their places to the one example of each row.

    `stop_tokens` are the ids that end generation: each assistant turn must end with one, or the tuned model would not stop.
    `date` is what a template that prints it is given. `allowed` are gates that are open: `lost_text` and `unlearnt_stop`.
    """
    template = template or template_of(tokenizer, task)
    renderer = Renderer(tokenizer, template, date)
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def render(row: Row, place: str) -> tuple[str, list[tuple[int, int]]]:
        conversation = conversation_of(row, place, row_rules)
        if row_rules == 1:
            _refuse_control_tokens(conversation, place, control, is_all=False)
            return renderer.spans(conversation, place)
        _refuse_roles(conversation, template, place)
        _refuse_control_tokens(conversation, place, control)
        text, spans = _render_calls(renderer, conversation, place)
        if "lost_text" not in allowed:
            refuse_lost(conversation, row, text, spans, place)
        return text, spans

    def encode(rows: Sequence[Row], places: Sequence[str]) -> list[list[Example]]:
        rendered = [render(*pair) for pair in zip(rows, places, strict=True)]
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
                has_stop = len(turn) and tokens[turn[-1]] in stop_tokens
                if not has_stop and "unlearnt_stop" not in allowed:
                    raise _no_stop_token(tokenizer, tokens[turn[-1:]], stop_tokens, places[number])
                supervised[turn] = True
            cut = max(0, len(tokens) - task.max_length)
            lost = int(supervised[max(1, task.max_length) :].sum())  # the first token of a row is never predicted
            examples.append([Example(tokens[: task.max_length], supervised[: task.max_length], cut, lost)])
        return examples

    return encode


def explained(
    tokenizer: PreTrainedTokenizerBase, task: ChatTask, stop_tokens: Collection[int], **rendering: Any
) -> Explain:
    """A function from a row and its place to its example before cutting, with a reason for each token."""
    whole = task.model_copy(update={"max_length": 2**31})
    encode = encoder(tokenizer, whole, stop_tokens, **rendering)

    def explain(row: Row, place: str) -> list[Explained]:
        [[example]] = encode([row], [place])
        texts = [str(tokenizer.decode([token])) for token in example.tokens.tolist()]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        offsets = np.stack([ends - [len(text) for text in texts], ends], axis=1)
        reasons = [_reason(bool(is_learnt)) for is_learnt in example.supervised]
        kept = min(len(texts), task.max_length)
        return [Explained("".join(texts), example.tokens, offsets, example.supervised, reasons, kept)]

    return explain


def _reason(is_learnt: bool) -> str:
    return "text of an assistant turn, or the token that ends it" if is_learnt else "not text of an assistant turn"


def template_of(
    tokenizer: PreTrainedTokenizerBase, task: ChatTask, is_known: Callable[[str], bool] = lambda text: False
) -> str:
    """The chat template in force: the recipe's file, or the base's own. Of a file that is gone, a copy elsewhere that `is_known`."""
    if task.template is not None:
        try:
            template = _template_in(task.template)
        except FileNotFoundError as error:
            copy = _copy_of(task.template, is_known)
            if copy is None:
                raise _unreadable(task.template, error) from None
            template = copy
        except OSError as error:
            raise _unreadable(task.template, error) from None
        if problem := templates.problem(template):
            raise DataError(f"the template {problem}", where=task.template, hint="fix it, or use the base's own")
        return template
    if own := templates.default(tokenizer.chat_template):
        return own
    if names := templates.names(tokenizer.chat_template):
        message = f"the base has several chat templates, and none is called `default`: {', '.join(names)}"
        raise DataError(message, hint="save one of them to a file, and name it with task.template: FILE")
    raise DataError("the base has no chat template", hint=TEMPLATE_HINT)


def _template_in(name: str) -> str:
    try:
        return templates.decoded(Path(name).read_bytes())
    except ValueError as error:
        raise DataError(f"the template {error}", where=name, hint="save it as UTF-8") from None


def _copy_of(name: str, is_known: Callable[[str], bool]) -> str | None:
    """The text of a template file that was moved, or that the checkpoints of its run alone still have."""
    for place in (*places.around(name), *places.in_checkpoints(TEMPLATE)):
        if Path(place).is_file() and is_known(text := _template_in(place)):
            places.found(name, place, "template")
            return text
    return None


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"cannot be read: {error.strerror}", where=name, hint="task.template names a file")


def _refuse_roles(conversation: Conversation, template: str, place: str) -> None:
    """A role that the template does not know is written as it stands, or not at all."""
    for message, field in zip(conversation.messages, conversation.places, strict=True):
        role = message["role"]
        if role not in ROLES and not any(f"{quote}{role}{quote}" in template for quote in "\"'"):
            hint = f"rename it to one of {', '.join(ROLES)}"
            raise DataError(
                f"`{field}.role` is `{role}`, which the chat template does not name", where=place, hint=hint
            )


def _refuse_control_tokens(conversation: Conversation, place: str, control: Sequence[str], is_all: bool = True) -> None:
    """Text that spells a control token would become that token, and end or forge a turn; in contents, or wherever there is text."""
    named = [(f"{message['role']} message", message.get("content")) for message in conversation.messages]
    if is_all:
        for message, field in zip(conversation.messages, conversation.places, strict=True):
            named += [(f"`{field}.{name}`", value) for name, value in message.items() if name != "content"]
        named.append(("`tools`", conversation.tools))
    for name, value in named:
        for text in _strings(value):
            if token := next((token for token in control if token in text), None):
                said = name if name.startswith("`") else f"a {name}"
                raise DataError(f"{said} spells the control token `{token}`", where=place, hint="remove or respell it")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _render_calls(renderer: Renderer, conversation: Conversation, place: str) -> tuple[str, list[tuple[int, int]]]:
    """Text and spans, with the arguments of tool calls as objects, or as JSON text for a template that writes them as they come."""
    texts = with_text_arguments(conversation)
    if texts is None:
        return renderer.spans(conversation, place)
    try:
        rendered = renderer.spans(conversation, place)
    except DataError as error:
        try:
            return renderer.spans(texts, place)
        except DataError:
            raise error from None
    is_python = any(str(arguments) in rendered[0] for arguments in arguments_of(conversation) if arguments)
    return renderer.spans(texts, place) if is_python else rendered


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


TASK = Task(
    encoder,
    content.of_chat,
    causal.collate_packed,
    causal.collate_padded,
    causal.loss,
    causal.score,
    template_of,
    explained,
)
