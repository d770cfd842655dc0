"""`messages`, or `prompt` and `completion`, as chat APIs and the Hub export them; also as JSON text in the column.

A row that a task could always read stays as it is: runs that exist know their rows by it.
"""

from finetune.data.completeness import is_said
from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.json_text import json_of
from finetune.data.shapes.shape import Shape, listed
from finetune.data.shapes.turns import message_of
from finetune.errors import DataError

COLUMN = "messages"


def fits(row: Row) -> bool:
    if row.get(COLUMN) is not None:
        return isinstance(listed(row[COLUMN]), list)
    return all(isinstance(row.get(name), str | list) for name in ("prompt", "completion"))


def canonical(row: Row, where: str) -> Row:
    messages = listed(row.get(COLUMN))
    if messages is not None and not isinstance(messages, list):
        raise DataError(
            f"`{COLUMN}` must be a list of messages, each with `role` and `content`, not {kind_of(messages)}",
            where=where,
        )
    made: Row = {COLUMN: messages} if messages is not None else {}
    if messages is None:
        made = {name: row[name] for name in ("prompt", "completion") if isinstance(row.get(name), list)}
    items = [item for value in made.values() if isinstance(value, list) for item in value]
    has_answer = messages is None and isinstance(row.get("completion"), str)
    if not (all(map(_is_plain, items)) and (has_answer or any(_role(item) == "assistant" for item in items))):
        made = {name: _messages(value, name, where) for name, value in made.items() if isinstance(value, list)}
    return _with_tools(row | made, where)


def _messages(items: list[object], column: str, where: str) -> list[Row]:
    return [message_of(item, f"{column}[{number}]", where) for number, item in enumerate(items)]


def _role(item: object) -> object:
    return item.get("role") if isinstance(item, dict) else None


def _is_plain(item: object) -> bool:
    """Whether it has a role, and a text or calls, as templates read them."""
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or item.get("function_call") is not None:
        return False
    return isinstance(item.get("content"), str) or (item.get("content") is None and bool(item.get("tool_calls")))


def _with_tools(row: Row, where: str) -> Row:
    """The row with `functions` of older exports as `tools`, unless a message shows them already."""
    functions = row.get("functions")
    if not functions or row.get("tools") or is_said(functions, row):
        return row
    if isinstance(functions, str):
        try:
            functions = json_of(functions)
        except ValueError:
            raise DataError("`functions` is text that is not JSON", where=where) from None
    if not isinstance(functions, list) or not all(isinstance(each, dict) for each in functions):
        raise DataError("`functions` must be a list of objects, or that as JSON text", where=where)
    kept = {column: value for column, value in row.items() if column != "functions"}
    return kept | {
        "tools": [each if "function" in each else {"type": "function", "function": each} for each in functions]
    }


SHAPE = Shape("conversation", fits, canonical)
