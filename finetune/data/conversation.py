"""The conversation in a chat row: messages, tools, and the learnt turns. Refuses bad content by name.

Needs neither torch nor a tokenizer, so rows can be checked before a base is opened.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune.data.json_text import json_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES
from finetune.store.strict_json import RepeatedKeyError

FIELDS = ("messages", "prompt", "completion", "system", "tools")
ROLES = ("system", "user", "assistant", "tool")
"""Every template is expected to know these roles; any other role has to appear in the template."""
FLAGS = ("train", "loss", "learn")
"""Fields of a message that say whether it is learnt, by the names that tools give it."""

Row = Mapping[str, object]
Message = dict[str, Any]
"""A message as its row's JSON has it, with whatever fields it has there. Once checked, it has a `role` and a `content` that are text."""
Tool = dict[str, Any]
"""A function that may be called, as JSON schema describes it."""


class Conversation(NamedTuple):
    messages: list[Message]
    places: list[str]
    """The place of each message in its row, like `messages[2]`."""
    turns: list[int]
    """Indices of the learnt messages."""
    tools: list[Tool] | None = None


def conversation_of(row: Row, where: str, row_rules: int = ROW_RULES) -> Conversation:
    """The checked conversation of a row. `row_rules` 1 takes the messages as they are, without tools and a system column."""
    parts = _parts(row, where)
    messages = [message for _, part in parts for message in part]
    places = [f"{column}[{number}]" for column, part in parts for number in range(len(part))]
    for message, place in zip(messages, places, strict=True):
        _check(message, place, where, row_rules)
    # Assistant messages of `prompt` are context: only those of `completion` are learnt.
    given = len(parts[0][1]) if len(parts) > 1 else 0
    opening = next((number for number, each in enumerate(messages) if each["role"] != "assistant"), len(messages))
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= given]
    answers = [number for number in turns if number >= opening]
    if opening and (row_rules == 1 or (turns and not answers)):
        raise DataError("begins with an assistant turn, which answers nothing", where=where, hint="remove the turn")
    turns = answers
    if not turns:
        reason = "has no assistant turn, so there is nothing to learn from it"
        roles = dict.fromkeys(each["role"] for each in messages)
        hint = "remove the row" if roles.keys() <= {*ROLES} else f"its roles are: {', '.join(roles)}"
        raise DataError(reason, where=where, hint=hint)
    # A run of older rules reads its rows as it always did, or its resume would train on others.
    if row_rules > 1:
        _refuse_bad_example(row, where)
        turns = [number for number in turns if _is_learnt(messages[number], places[number], where)]
        messages = [_plain(message, place, where) for message, place in zip(messages, places, strict=True)]
    if not turns:
        reason = "has no assistant turn to learn: each has `weight: 0`, `train: false`, `loss: false` or `learn: false`"
        raise DataError(reason, where=where, hint="remove the row")
    # A turn that only calls tools has no text.
    if not all(messages[number]["content"].strip() or messages[number].get("tool_calls") for number in turns):
        raise DataError("has an empty assistant turn", where=where, hint="remove the row")
    conversation = Conversation(messages, places, turns)
    return _with_columns(conversation, row, where) if row_rules > 1 else conversation


def _refuse_bad_example(row: Row, where: str) -> None:
    """Refuses the bad completions of KTO rows (arXiv 2402.01306): their `label` is false."""
    if row.get("messages") is None and row.get("label") is False:
        hint = "remove the row, or learn it all the same with data.train[].skip: [label]"
        raise DataError("`label` is false: its completion shows what not to answer", where=where, hint=hint)


def arguments_of(conversation: Conversation) -> list[dict[str, object]]:
    """The arguments of all tool calls."""
    calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
    return [call.get("function", call)["arguments"] for call in calls]


def with_text_arguments(conversation: Conversation) -> Conversation | None:
    """The same conversation with the arguments of tool calls as JSON text; None where there are no calls."""
    if not arguments_of(conversation):
        return None
    messages = [dict(message) for message in conversation.messages]
    for message in messages:
        for number, call in enumerate(calls := list(message.get("tool_calls", ()))):
            function = call.get("function", call)
            filled = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
            calls[number] = {**call, "function": filled} if "function" in call else filled
            message["tool_calls"] = calls
    return conversation._replace(messages=messages)


def kind_of(value: object) -> str:
    """The kind of a value, in words for a message."""
    if value is None:
        return "null"
    # pandas writes NaN where a text is missing.
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", bytes: "bytes"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _parts(row: Row, where: str) -> list[tuple[str, list[Message]]]:
    """The columns with messages, each as a list."""
    # Parquet gives every row all columns, so a null counts as absent.
    if row.get("messages") is not None:
        return [("messages", _listed(row["messages"], "messages", where))]
    missing = [name for name in ("prompt", "completion") if row.get(name) is None]
    if missing:
        null = next((name for name in ("messages", *missing) if name in row), None)
        if null and (null == "messages" or len(missing) == 1):
            raise DataError(f"`{null}` is null", where=where, hint="remove the row")
        present = ", ".join(sorted(row)) or "none"
        raise DataError(
            f"has neither `messages` nor `prompt` and `completion`; its columns are: {present}",
            where=where,
            hint='map columns with data.train[].columns, like {prompt: ask, completion: reply}, or write patterns, like `prompt: "{question}"`',
        )
    roles = {"prompt": "user", "completion": "assistant"}
    return [(name, _listed(row[name], name, where, role)) for name, role in roles.items()]


def _listed(value: object, column: str, where: str, role: str | None = None) -> list[Message]:
    """Messages as they are; text is one message of `role`."""
    if role and isinstance(value, str):
        return [{"role": role, "content": value}]
    if role and not isinstance(value, list):
        raise DataError(f"`{column}` must be text or a list of messages, not {kind_of(value)}", where=where)
    if not isinstance(value, list):
        message = f"`{column}` must be a list of messages, each with `role` and `content`, not {kind_of(value)}"
        raise DataError(message, where=where)
    if not value:
        raise DataError(f"`{column}` is an empty list", where=where, hint="remove the row")
    return value


def _check(message: object, place: str, where: str, row_rules: int) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        fields = f"its fields are: {', '.join(message) or 'none'}" if isinstance(message, dict) else None
        raise DataError(f"`{place}` must have a `role`", where=where, hint=fields)
    content = message.get("content")
    has_other = row_rules > 1 and content is None and message.get("tool_calls")
    if not isinstance(content, str) and not has_other:
        hint = "join its parts into one text; images and the like are not read" if isinstance(content, list) else None
        if content is None and (others := [name for name in message if name not in ("role", "content")]):
            hint = f"its other fields are: {', '.join(others)}"
        raise DataError(f"`{place}` must have a `content` that is text", where=where, hint=hint)


def _is_learnt(message: Message, place: str, where: str) -> bool:
    weight, flags = message.get("weight"), [message.get(name) for name in FLAGS]
    # In Python True equals 1, and would pass for a weight.
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"`{place}.weight` must be 0 or 1, not {weight!r}", where=where)
    for name, flag in zip(FLAGS, flags, strict=True):
        if flag is not None and flag not in (0, 1):
            raise DataError(f"`{place}.{name}` must be true or false, not {kind_of(flag)}", where=where)
    return weight != 0 and False not in flags


def _plain(message: Message, place: str, where: str) -> Message:
    """The message in the form of templates: without nulls, and with the arguments of tool calls as objects."""
    if message["role"] != "assistant" and (asked := next((name for name in FLAGS if message.get(name)), None)):
        raise DataError(f"`{place}.{asked}` asks to learn a {message['role']} message", where=where)
    # Parquet gives each message the fields of all messages, so null means absent.
    kept = {name: value for name, value in message.items() if value is not None and name not in ("weight", *FLAGS)}
    # Templates read `content` of every message.
    kept.setdefault("content", "")
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
        return kept
    if not isinstance(kept["tool_calls"], list):
        raise DataError(f"`{place}.tool_calls` must be a list, not {kind_of(kept['tool_calls'])}", where=where)
    kept["tool_calls"] = [
        _call(call, f"{place}.tool_calls[{number}]", where) for number, call in enumerate(kept["tool_calls"])
    ]
    return kept


def _call(call: object, place: str, where: str) -> dict[str, object]:
    """A tool call, as `{function: {name, arguments}}` or as `{name, arguments}`."""
    given = call if isinstance(call, dict) else {}
    function = given.get("function", given)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"`{place}` must have a `function` with a `name`", where=where)
    if function.get("arguments") is None and "parameters" in function:  # as Llama 3 writes calls
        function = {
            "arguments" if name == "parameters" else name: function[name] for name in function if name != "arguments"
        }
    # APIs return arguments as JSON text, and templates want objects.
    if isinstance(arguments := function.get("arguments"), str):
        arguments = _from_json(arguments or "{}", f"{place}.function.arguments", where)
    if arguments is not None and not isinstance(arguments, dict):
        message = f"`{place}.function.arguments` must be an object, or that as JSON text, not {kind_of(arguments)}"
        raise DataError(message, where=where)
    filled = {**function, "arguments": arguments or {}}
    return {**given, "function": filled} if "function" in given else filled


def _with_columns(conversation: Conversation, row: Row, where: str) -> Conversation:
    """Adds the `system` column as the first message, and the `tools` column."""
    tools, system = row.get("tools"), row.get("system")
    # Data sets often keep tools as text: a Parquet column has one type, and schemas differ.
    if isinstance(tools, str) and tools:
        tools = _from_json(tools, "tools", where)
    if isinstance(tools, list):
        tools = [
            _from_json(tool, f"tools[{number}]", where) if isinstance(tool, str) else tool
            for number, tool in enumerate(tools)
        ]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("`tools` must be a list of objects, or that as JSON text", where=where)
    conversation = conversation._replace(tools=tools if tools and isinstance(tools, list) else None)
    if system is None or system == "":
        return conversation
    if not isinstance(system, str):
        raise DataError(f"`system` must be text, not {kind_of(system)}", where=where)
    first = conversation.messages[0]
    if first["role"] != "system":
        return conversation._replace(
            messages=[{"role": "system", "content": system}, *conversation.messages],
            places=["system", *conversation.places],
            turns=[number + 1 for number in conversation.turns],
        )
    # Some data sets repeat the system message in a column.
    if first["content"].strip() != system.strip():
        raise DataError("has a `system` column and another system message", where=where, hint="keep one of them")
    return conversation


def _from_json(text: str, place: str, where: str) -> object:
    try:
        return json_of(text)
    except RepeatedKeyError as error:
        raise DataError(f"`{place}` is JSON that has the key `{error.key}` twice", where=where) from None
    except ValueError:
        raise DataError(f"`{place}` is text that is not JSON: `{text[:40]}`", where=where) from None
