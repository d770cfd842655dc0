"""The examples of a conversation: one with all its turns where the template allows it, else one for each learnt turn.

A learnt turn always follows exactly what the model is given when it is asked for that turn. This is found by rendering, never by a
model's name.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from finetune.data.conversation import Conversation, Message
from finetune.errors import DataError
from finetune.tasks.generation_marks import has_marks, refuse_other
from finetune.tasks.rendering import TEMPLATE_HINT, Renderer
from finetune.tasks.thought_marks import follows

SHOWN = 40  # characters of a text in a message
THOUGHT_HINT = "give the turn a thought, turn thinking off with task.template_variables, or name another task.template"


class Rendered(NamedTuple):
    """The text of one example."""

    text: str
    spans: list[tuple[int, int]]
    """What the model learns to write, in characters: from the end of what it is given to its stop token."""
    turns: list[int]
    """The number of the message of each span."""
    fields: list[str]
    """Where that is in the row."""
    is_whole: bool
    """Whether it holds the whole conversation; else it ends with its turn."""


class _Answer(NamedTuple):
    number: int
    text: str
    """The conversation up to the end of this turn, as it is while the turn is the last one."""
    start: int
    """Where the turn begins, after the generation prompt."""
    end: int | None
    """Where its first stop token ends, if it has one."""


class Ends(NamedTuple):
    """What the end of a turn may be made of."""

    stops: Sequence[str]
    """The tokens that end generation."""
    control: Sequence[str]
    """All control tokens of the tokenizer."""


def rendered(renderer: Renderer, conversation: Conversation, ends: Ends, place: str) -> list[Rendered]:
    """The texts of the learnt turns."""
    whole = renderer.text(conversation.messages, place, conversation.tools)
    last = len(conversation.messages) - 1
    answers = [
        _answer(renderer, conversation, number, whole if number == last else None, ends, place)
        for number in conversation.turns
    ]
    fields = [conversation.places[number] for number in conversation.turns]
    if one := _in_one(whole, answers):
        text, spans = one
        return [Rendered(text, spans, conversation.turns, fields, is_whole=True)]
    return [
        Rendered(each.text, [(each.start, len(each.text))], [each.number], [field], is_whole=False)
        for each, field in zip(answers, fields, strict=True)
    ]


def _in_one(whole: str, answers: Sequence[_Answer]) -> tuple[str, list[tuple[int, int]]] | None:
    """The text of the whole conversation and its learnt spans, if each turn stands in it as it does when the model writes it."""
    last = answers[-1].text
    # Longer by the stop token that another role's turn would begin with.
    text = last if last.startswith(whole) else whole
    spans = []
    for answer in answers:
        # Some templates end the text, not the turn: only what comes before the model stops has to be the same.
        ways = (len(answer.text), answer.end)
        end = next((way for way in ways if way and text.startswith(answer.text[:way])), None)
        if end is None:
            return None
        spans.append((answer.start, end))
    return text, spans


def _first_stop(text: str, start: int, ends: Ends) -> tuple[int | None, str]:
    """The end of a turn's first stop token, if there is one, and what comes after it beside control tokens and blanks."""
    found = [(at, stop) for stop in ends.stops if (at := text.find(stop, start)) >= 0]
    if not found:
        return None, ""
    end = min(at + len(stop) for at, stop in found)
    after = text[end:].strip()
    for token in (*ends.stops, *ends.control) if after else ():
        after = after.replace(token, "")
    return end, after.strip()


def _answer(
    renderer: Renderer, conversation: Conversation, number: int, through: str | None, ends: Ends, place: str
) -> _Answer:
    """A learnt turn. `through` is the conversation up to and with it, where that is rendered already."""
    messages, tools, field = conversation.messages, conversation.tools, conversation.places[number]
    prompt = renderer.text(messages[:number], place, tools, with_header=True)
    through = renderer.text(messages[: number + 1], place, tools) if through is None else through
    text = through
    if not through.startswith(prompt):
        bare = renderer.text(messages[:number], place, tools)
        text = prompt + _written(prompt, through, bare, field, place)
    if has_marks(renderer.template):
        shown, written = messages[: number + 1], text[len(prompt) :]
        refuse_other(renderer, shown, tools, written=written, field=field, place=place)
    if not text.rstrip().endswith(tuple(ends.stops)):
        text += _next_role(renderer, conversation, number, through, ends.stops)
    end, after = _first_stop(text, len(prompt), ends)
    if after:  # the model stops there, and never writes the rest
        raise _cannot(f"has a stop token within the turn `{field}`, before {after[:SHOWN]!r}", place)
    return _Answer(number, text, len(prompt), end)


def _written(prompt: str, through: str, bare: str, field: str, place: str) -> str:
    """What the model writes after a generation prompt that is not how its turn begins once it is there.

    `bare` is the conversation before the turn, without a generation prompt.
    """
    header, same = len(os.path.commonprefix([prompt, bare])), len(os.path.commonprefix([prompt, through]))
    asked = prompt[header:]
    written = follows(asked, same - header, through[same:]) if same >= header else None
    if written is not None:
        return written
    # What is before the turn changed as well, or has a blank more: the model is given it as it was.
    at = through.rfind(asked) if asked.strip() else -1
    if at >= 0 and (same < header or not through[same:at].strip()):
        return through[at + len(asked) :]
    if same < header:
        said = f"{prompt[same:][:SHOWN]!r} becomes {through[same:][:SHOWN]!r}"
        raise _cannot(f"renders what is before `{field}` in another way once that is there: {said}", place)
    said = (
        f"asks for an answer with {asked[-SHOWN:]!r}, and begins the turn `{field}` with {through[header:][:SHOWN]!r}"
    )
    raise _cannot(said, place, THOUGHT_HINT)


def _next_role(renderer: Renderer, conversation: Conversation, number: int, through: str, stops: Sequence[str]) -> str:
    """The stop token that the next message begins with, for templates whose turns end there; empty if it begins otherwise."""
    messages = conversation.messages
    followed = messages[number + 1] if number + 1 < len(messages) else _reply_to(messages[number])
    # a template that rewrites earlier turns leaves this one as it is
    plain = {"role": messages[number]["role"], "content": "!"}
    for turn, text in ((messages[number], through), (plain, None)):
        before = [*messages[:number], turn]
        try:
            text = renderer.text(before, None, conversation.tools) if text is None else text
            longer = renderer.text([*before, followed], None, conversation.tools)
        except DataError:  # it may not follow: then nothing does
            continue
        after = longer[len(text) :] if longer.startswith(text) else ""
        if stop := next((stop for stop in stops if after.lstrip().startswith(stop)), None):
            return after[: len(after) - len(after.lstrip())] + stop
    return ""


def _reply_to(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return {"role": "user", "content": "?"}
    call = calls[0]
    named = {"name": call.get("function", call)["name"]}
    return {"role": "tool", "content": "?", **named, **({"tool_call_id": call["id"]} if "id" in call else {})}


def _cannot(said: str, place: str, hint: str = TEMPLATE_HINT) -> DataError:
    return DataError(f"the chat template {said}, so assistant tokens cannot be told apart", where=place, hint=hint)
