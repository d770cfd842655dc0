"""Why each token of a chat example is learnt or not, in words. For people who look at rows: training does not need it."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from finetune.data.conversation import Conversation, Message
from finetune.errors import DataError
from finetune.tasks.turns import Rendered

Render = Callable[[int], str | None]
"""The number of a message -> the text of the conversation up to and with it; None if the template refuses that."""


def reasons_of(
    conversation: Conversation, one: Rendered, render: Render, offsets: np.ndarray, supervised: np.ndarray, learn: str
) -> list[str]:
    """A sentence for each token. `offsets` (T, 2) are its characters, `supervised` (T,) is the mask."""
    edges = list(_edges(conversation, one, render))
    reasons = []
    for number, ((start, end), is_learnt) in enumerate(zip(offsets.tolist(), supervised.tolist(), strict=True)):
        if number == 0:
            reasons.append("not learnt: the first token of an example, which nothing predicts")
        elif is_learnt:
            reasons.append(_learnt(conversation, one, start, end))
        else:
            reasons.append(_unlearnt(conversation, one, edges, start, learn))
    return reasons


def _learnt(conversation: Conversation, one: Rendered, start: int, end: int) -> str:
    for turn, (first, last) in zip(one.turns, one.spans, strict=True):
        if end > first and start < last:
            is_end = not one.text[end:last].strip()
            return f"learnt: ends {conversation.places[turn]}" if is_end else f"learnt: {conversation.places[turn]}"
    return "learnt: task.learn is `all`"


def _unlearnt(conversation: Conversation, one: Rendered, edges: Sequence[int], start: int, learn: str) -> str:
    for turn, (first, last) in zip(one.turns, one.spans, strict=True):
        if last > start >= first:
            return f"not learnt: the template writes it after the stop token of {conversation.places[turn]}"
        before = edges[turn - 1] if turn else 0
        if before <= start < first:
            return f"not learnt: what the model is given to begin {conversation.places[turn]}"
    number = next((number for number, edge in enumerate(edges) if start < edge), None)
    if number is None:
        return "not learnt: the template writes it after the conversation"
    message, place = conversation.messages[number], conversation.places[number]
    if message["role"] != "assistant":
        return f"not learnt: {place}, a {message['role']} message with its header"
    if number in one.turns:
        return f"not learnt: the template writes it around {place}"
    if number in conversation.turns:
        return f"not learnt: {place}, learnt in another example"
    if place.startswith("prompt"):
        return f"not learnt: {place}, a turn of the prompt"
    if learn == "last":
        return f"not learnt: {place}, not the last turn (task.learn)"
    if all(map(_opens, conversation.messages[:number], conversation.places)):
        return f"not learnt: {place} opens the conversation, so nothing asks for it"
    return f"not learnt: {place} has `weight: 0` or `train: false`"


def _opens(message: Message, place: str) -> bool:
    """Whether a message is before all that could ask: turns of the assistant, and a system message from beside the messages."""
    return message["role"] == "assistant" or place in ("system", "task.system")


def _edges(conversation: Conversation, one: Rendered, render: Render) -> Iterator[int]:
    """Where each message ends in the text, as far as the template tells; at least where the one before does."""
    edge = 0
    for number in range(len(conversation.messages)):
        through = render(number)
        if through is not None:
            edge = max(edge, len(os.path.commonprefix([through, one.text])))
        yield edge


def tolerant(render: Callable[[int], str]) -> Render:
    """Messages that may not come last, for some template, have no edge of their own."""

    def rendered(number: int) -> str | None:
        try:
            return render(number)
        except DataError:
            return None

    return rendered
