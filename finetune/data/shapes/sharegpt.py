"""ShareGPT: a list of turns of `from` and `value`, of pairs, or of texts by turns, in a column like `conversations`, with `system` and `tools` beside it."""

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.shapes.shape import SYSTEMS, Shape, listed, refuse, replaced, system_of
from finetune.data.shapes.turns import ROLE_FIELDS, message_of
from finetune.errors import DataError

COLUMNS = ("conversations", "conversation", "dialog", "dialogue", "dialogs", "turns", "chat", "items")

PAIRS = (
    *(("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot")),
    *(("input", "output"), ("question", "answer"), ("query", "response"), ("prompt", "response")),
)
"""Fields of a turn that is a question with its answer."""


def fits(row: Row) -> bool:
    return any(_is_turns(listed(row.get(column))) for column in COLUMNS)


def _is_turns(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) for each in value)
    has_pair = isinstance(first, dict) and any(question in first and answer in first for question, answer in PAIRS)
    return has_pair or (isinstance(first, dict) and any(name in first for name in ROLE_FIELDS))


def _messages(turn: object, place: str, where: str) -> list[Row]:
    """The message of a turn, or the two of a pair like `{human, assistant}`."""
    for question, answer in PAIRS:
        if isinstance(turn, dict) and isinstance(turn.get(question), str) and isinstance(turn.get(answer), str):
            others = [name for name, value in turn.items() if name not in (question, answer) and value is not None]
            if others:
                message = f"`{place}` has `{others[0]}` beside `{question}` and `{answer}`"
                raise DataError(message, where=where, hint=f"skip it: data.train[].skip: [{others[0]}]")
            return [{"role": "user", "content": turn[question]}, {"role": "assistant", "content": turn[answer]}]
    return [message_of(turn, place, where)]


def canonical(row: Row, where: str) -> Row:
    present = [column for column in COLUMNS if row.get(column) is not None]
    if len(present) > 1:
        names = " and ".join(f"`{column}`" for column in present)
        message = f"has {names}: each could be the conversation"
        raise DataError(message, where=where, hint=f"name the one to drop: data.train[].skip: [{present[-1]}]")
    if not present:
        null = next((f"`{column}` is null" for column in COLUMNS if column in row), None)
        refuse("sharegpt", row, null or f"it has no `{COLUMNS[0]}`", where)
    [column] = present
    turns = listed(row[column])
    if not isinstance(turns, list):
        raise DataError(f"`{column}` must be a list of turns, not {kind_of(turns)}", where=where)
    if not turns:
        raise DataError(f"`{column}` is an empty list", where=where, hint="remove the row")
    if all(isinstance(turn, str) for turn in turns):
        turns = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    places = [f"{column}[{number}]" for number in range(len(turns))]
    pairs = zip(turns, places, strict=True)
    made: Row = {"messages": [message for turn, place in pairs for message in _messages(turn, place, where)]}
    used = [column, *SYSTEMS, "tools"]
    made |= system_of(row, where)
    if (tools := row.get("tools")) and listed(tools) != []:
        made["tools"] = tools
    return replaced(row, used, made, "conversation", where)


SHAPE = Shape("conversation", fits, canonical)
