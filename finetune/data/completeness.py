"""Finds content of a row that is missing in its rendered text, so that a template drops nothing silently.

A template may trim a text, or write it as JSON or as Python does. So the search also tries those forms, without blanks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from finetune.data.conversation import FIELDS, Conversation, Message, Tool
from finetune.errors import DataError

MESSAGE_COLUMNS = ("messages", "prompt", "completion")
IDENTIFIERS = ("role", "tool_call_id", "id", "type", "index")
"""Fields of messages and tool calls that are only references."""
CONTENT_COLUMNS = (
    *FIELDS,
    *("input", "history", "instruction", "output", "context", "functions", "documents", "chat_template_kwargs"),
    *("system_prompt", "reasoning", "reasoning_content", "thinking", "image", "images", "audio", "audios", "videos"),
)
"""Columns that usually belong to a conversation. Others describe the row, and `plan` names them."""


class Said(NamedTuple):
    """One piece of a row's content."""

    place: str
    forms: Sequence[str]
    """Spellings; one of them has to be in the text."""
    message: int | None = None


def said(conversation: Conversation) -> Iterator[Said]:
    """All texts of a conversation, in its order."""
    for number, tool in enumerate(conversation.tools or []):
        yield from _tool(tool, f"tools[{number}]")
    for number, (message, place) in enumerate(zip(conversation.messages, conversation.places, strict=True)):
        for found in _message(message, place):
            yield found._replace(message=number)


def refuse_lost(
    conversation: Conversation, row: Mapping[str, object], texts: Sequence[str], learnt: Mapping[int, str], where: str
) -> None:
    """Raises DataError if content of the row is in none of the texts. That of a learnt turn has to be in what is learnt of that turn.

    `learnt` has it by the number of the message.
    """
    whole, parts = _Text("\0".join(texts)), {number: _Text(text) for number, text in learnt.items()}
    lost = [
        each.place
        for each in said(conversation)
        if not (whole if each.message is None else parts.get(each.message, whole)).has(each.forms)
    ]
    # Only these are rendered. A `prompt` beside `messages` has to be in their text, or it is lost.
    used = ("messages",) if row.get("messages") is not None else ("prompt", "completion")
    for column in CONTENT_COLUMNS:
        if column in row and column not in (*used, "system", "tools"):
            is_there = all(whole.has(each.forms) for each in _leaves(row[column], column, has_keys=False))
            lost += [] if is_there else [column]
    lost = list(dict.fromkeys(lost))  # a key and its value have one place
    if not lost:
        return
    named = ", ".join(f"`{place}`" for place in lost[:4])
    named += f" and {len(lost) - 4} more" if len(lost) > 4 else ""
    fields = dict.fromkeys(_field(place) for place in lost)
    is_column = fields.keys() <= row.keys() - {"tools"}
    hint = (
        "put it into a message, or into a pattern"
        if is_column
        else "use a template that shows it, with task.template: FILE, or a built-in one like `chatml`"
    )
    if "content" not in fields:
        hint += f", or train without it, with data.train[].skip: [{', '.join(fields)}]"
    raise DataError(f"the rendered text lacks {named}", where=where, hint=hint)


def is_said(value: object, row: Mapping[str, object]) -> bool:
    """Whether all texts and numbers of a value are in the messages of a row."""
    texts = [
        part.forms[0] for name in (*MESSAGE_COLUMNS, "system") for part in _leaves(row.get(name), name, has_keys=False)
    ]
    whole = _Text("\n".join(texts))
    return all(whole.has(each.forms) for each in _leaves(value, "", has_keys=False))


class _Text:
    def __init__(self, text: str):
        self._text = text
        self._dense: str | None = None

    def has(self, forms: Sequence[str]) -> bool:
        # Most texts are there as they are, and the dense text costs a copy of all of it.
        if any(form.strip() in self._text for form in forms):
            return True
        if self._dense is None:
            self._dense = _dense(self._text)
        return any(_dense(form) in self._dense for plain in forms for form in _written(plain))


def _dense(text: str) -> str:
    # Templates trim, indent and break lines.
    return "".join(text.split())


def _written(text: str) -> list[str]:
    """The ways a template may write a text: as it is, in JSON, in JSON within JSON, and as Python does."""
    text = text.strip()
    # JSON escapes quotes and line ends; tool calls often have JSON as text within JSON.
    in_json = json.dumps(text, ensure_ascii=False)[1:-1]
    return [text, in_json, json.dumps(text)[1:-1], json.dumps(in_json, ensure_ascii=False)[1:-1], repr(text)[1:-1]]


def _message(message: Message, place: str) -> Iterator[Said]:
    for field, value in message.items():
        if field == "tool_calls":
            for number, call in enumerate(value):
                called = f"{place}.tool_calls[{number}]"
                # Rows have calls both ways: within `function`, and bare.
                function = call.get("function", call)
                others = {name: call[name] for name in call if name not in ("function", "name", "arguments")}
                yield from _leaves(function["name"], f"{called}.function.name")
                yield from _leaves(function["arguments"], f"{called}.function.arguments")
                within = {name: function[name] for name in function if name not in ("name", "arguments")}
                if function is not call:
                    yield from _leaves(_without_identifiers(within), f"{called}.function", has_keys=False)
                yield from _leaves(_without_identifiers(others), called, has_keys=False)
        # Ids only link a call to its result, and templates rarely print them.
        elif field not in IDENTIFIERS:
            yield from _leaves(value, f"{place}.{field}", has_keys=False)


def _without_identifiers(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in IDENTIFIERS}


def _tool(tool: Tool, place: str) -> Iterator[Said]:
    """Names and descriptions of a tool and of its parameters. Types are skipped: a template may have its own words for them."""
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        yield Said(place, (str(function),))
        return
    for name in ("name", "description"):
        if isinstance(function.get(name), str):
            yield Said(f"{place}.{name}", (function[name],))
    yield from _properties(function.get("parameters"), f"{place}.parameters")


def _properties(schema: object, place: str) -> Iterator[Said]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for name, value in properties.items() if isinstance(properties, dict) else ():
        yield Said(f"{place}.{name}", (name,))
        if isinstance(value, dict) and isinstance(value.get("description"), str):
            yield Said(f"{place}.{name}.description", (value["description"],))
        yield from _properties(value, f"{place}.{name}")


def _leaves(value: object, place: str, has_keys: bool = True) -> Iterator[Said]:
    """The texts and numbers of a value, and its keys if `has_keys`."""
    if isinstance(value, dict):
        for name, item in value.items():
            if has_keys:
                yield Said(f"{place}.{name}", (name,))
            yield from _leaves(item, f"{place}.{name}", has_keys)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{place}[{number}]", has_keys)
    elif isinstance(value, str):
        yield Said(place, (value,))
    elif value is not None:
        # `true` in JSON is `True` in Python, and templates write either.
        yield Said(place, (json.dumps(value, default=str), str(value)))


def _field(place: str) -> str:
    """Its name in `skip`: a column, or a field of messages."""
    column, *fields = place.replace("[", ".").split(".")
    return fields[1] if column in MESSAGE_COLUMNS and len(fields) > 1 else column
