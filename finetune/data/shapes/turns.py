"""One message of any spelling as `{role, content}`: names of fields and roles, contents in parts, calls of functions."""

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.json_text import json_of
from finetune.data.roles import known_role
from finetune.errors import DataError

ROLE_FIELDS = ("role", "from", "user", "speaker")
CONTENT_FIELDS = ("content", "value", "text")
CALLS = ("function_call", "tool_call", "tool_calls")
"""Roles of ShareGPT rows; the value of such a turn is JSON of one call, or of a list of calls."""
TEXT_PARTS = ("text", "input_text", "output_text")


def message_of(item: object, place: str, where: str) -> Row:
    """The message in the form of templates; an unknown role stays, and the encoder refuses it by name."""
    if not isinstance(item, dict):
        raise DataError(f"`{place}` must have a `role`", where=where, hint=f"it is {kind_of(item)}")
    role_field, content_field = _field(item, ROLE_FIELDS, place, where), _field(item, CONTENT_FIELDS, place, where)
    if role_field is None or not isinstance(role := item[role_field], str):
        hint = f"its fields are: {', '.join(item) or 'none'}"
        raise DataError(f"`{place}` must have a `role`", where=where, hint=hint)
    others = {name: value for name, value in item.items() if name not in (role_field, content_field)}
    content = item.get(content_field) if content_field else None
    if role in CALLS:
        if item.get("tool_calls") or item.get("function_call"):
            said = f"`{place}` has calls in `{content_field}` and beside it"
            raise DataError(said, where=where, hint="keep one of them")
        return {"role": "assistant", **others, **_calls(content, f"{place}.{content_field}", where)}
    message: Row = {"role": known_role(role)}
    if content_field:
        message["content"] = _text(content, f"{place}.{content_field}", where)
    return _with_calls(message | others, place, where)


def _field(item: Row, names: tuple[str, ...], place: str, where: str) -> str | None:
    """The one of these fields that the item has; the first name is the usual one, and comes before all others."""
    present = [name for name in names if item.get(name) is not None]
    if len(present) > 1 and present[0] != names[0]:
        fields = " and ".join(f"`{name}`" for name in present)
        raise DataError(f"`{place}` has {fields}: each could be the same field", where=where, hint="keep one of them")
    return next((name for name in (*present, *names) if name in item), None)


def _text(content: object, place: str, where: str) -> object:
    """The text of a content; parts are joined as they are. None stays: a turn with calls has no text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"`{place}` must be text, not {kind_of(content)}", where=where)
    return "".join(_part(part, f"{place}[{number}]", where) for number, part in enumerate(content))


def _part(part: object, place: str, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise DataError(f"`{place}` must be text or a part of a message, not {kind_of(part)}", where=where)
    kind = part.get("type", "text")
    others = [name for name in part if name not in ("type", "text") and part[name] not in (None, [], {}, "")]
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        named = f"of type `{kind}`" if isinstance(kind, str) else "without a type"
        hint = "images, audio and the like are not read: remove the row, or the part"
        raise DataError(f"`{place}` is a part {named}, not text", where=where, hint=hint)
    if others:
        raise DataError(f"`{place}` has `{others[0]}` beside its text", where=where, hint="remove it from the part")
    return str(part["text"])


def _with_calls(message: Row, place: str, where: str) -> Row:
    """The message with a `function_call` of older exports as `tool_calls`."""
    if (call := message.get("function_call")) is None:
        return message
    if message.get("tool_calls"):
        raise DataError(f"`{place}` has both `function_call` and `tool_calls`", where=where, hint="keep one of them")
    kept = {name: value for name, value in message.items() if name not in ("function_call", "tool_calls")}
    return kept | _calls(call, f"{place}.function_call", where)


def _calls(value: object, place: str, where: str) -> Row:
    """`tool_calls` of a call or a list of calls, or of JSON text of that."""
    if isinstance(value, str):
        try:
            value = json_of(value)
        except ValueError:
            message = f"`{place}` must be JSON of a call with `name` and `arguments`"
            raise DataError(message, where=where, hint="quote it as JSON does, or correct the role") from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(f"`{place}` has no call", where=where, hint="remove the turn")
    return {"tool_calls": [_call(call, place, where) for call in calls]}


def _call(call: object, place: str, where: str) -> Row:
    given = call if isinstance(call, dict) else {}
    function = given.get("function", given)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"`{place}` must be a call with `name` and `arguments`", where=where)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json_of(arguments or "{}")
        except ValueError:
            raise DataError(f"`{place}` has arguments that are not JSON", where=where) from None
    if arguments is not None and not isinstance(arguments, dict):
        raise DataError(f"`{place}` must have arguments that are an object, not {kind_of(arguments)}", where=where)
    others = {name: item for name, item in function.items() if name not in ("name", "arguments", "parameters")}
    outside = {name: item for name, item in given.items() if name not in ("function", "type")}
    outside = outside if "function" in given else {}
    return {
        "type": "function",
        **outside,
        "function": {"name": function["name"], "arguments": arguments or {}, **others},
    }
