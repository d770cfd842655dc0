"""ShareGPT: a list of turns of `from` and `value`, in a column like `conversations`, with `system` and `tools` beside it."""

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.shapes.shape import Shape, listed, optional_text, refuse, replaced
from finetune.data.shapes.turns import ROLE_FIELDS, message_of
from finetune.errors import DataError

COLUMNS = ("conversations", "conversation", "dialog", "dialogue", "dialogs", "turns", "chat")


def fits(row: Row) -> bool:
    return any(_is_turns(listed(row.get(column))) for column in COLUMNS)


def _is_turns(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(name in first for name in ROLE_FIELDS)


def canonical(row: Row, where: str) -> Row:
    present = [column for column in COLUMNS if row.get(column) is not None]
    if len(present) > 1:
        names = " and ".join(f"`{column}`" for column in present)
        message = f"has {names}: each could be the conversation"
        raise DataError(message, where=where, hint=f"name the one to drop: data.train[].skip: [{present[-1]}]")
    if not present:
        refuse("sharegpt", row, f"it has none of {', '.join(f'`{column}`' for column in COLUMNS[:2])}", where)
    [column] = present
    turns = listed(row[column])
    if not isinstance(turns, list):
        raise DataError(f"`{column}` must be a list of turns, not {kind_of(turns)}", where=where)
    if not turns:
        raise DataError(f"`{column}` is an empty list", where=where, hint="remove the row")
    made: Row = {"messages": [message_of(turn, f"{column}[{number}]", where) for number, turn in enumerate(turns)]}
    used = [column, "system", "system_prompt", "tools"]
    systems = dict.fromkeys(filter(None, (optional_text(row, name, where) for name in ("system", "system_prompt"))))
    if len(systems) > 1:
        raise DataError("has a `system` column and another system message", where=where, hint="keep one of them")
    if systems:
        made["system"] = next(iter(systems))
    if (tools := row.get("tools")) and listed(tools) != []:
        made["tools"] = tools
    return replaced(row, used, made, "conversation", where)


SHAPE = Shape("conversation", fits, canonical)
