"""Conversations whose tools do not fit together, or that end with what is never learnt."""

import json
from collections.abc import Iterator

from finetune.data.checks.looked import Looked


def tools(looked: Looked) -> Iterator[str]:
    """Calls of tools that the row does not offer, results without a call, and calls without a result in between."""
    messages = looked.columns.get("messages")
    if not isinstance(messages, list):
        return
    offered, called = tool_names(looked.columns.get("tools")), set()
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        for name, identifier in calls(message):
            called.add(identifier)
            if offered and name not in offered:
                yield f"`messages[{number}]` calls `{name}`, which is not among the row's tools: {', '.join(sorted(offered))}"
        answered = message.get("tool_call_id")
        if message.get("role") == "tool" and answered and called != {None} and answered not in called:
            yield f"`messages[{number}]` answers the call `{answered}`, which no message makes"


def calls(message: dict[str, object]) -> Iterator[tuple[str, str | None]]:
    """Name and id of each call of a message."""
    given = message.get("tool_calls")
    for call in given if isinstance(given, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            identifier = call.get("id")
            yield function["name"], identifier if isinstance(identifier, str) else None


def tool_names(tools: object) -> set[str]:
    """The names in a `tools` column; none where it cannot be read."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        return set()
    names = set()
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            names.add(function["name"])
    return names


def unanswered(looked: Looked) -> Iterator[str]:
    messages = looked.columns.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") not in ("assistant", None) and looked.answers:
        yield f"ends with a {last['role']} message, which is never learnt"
