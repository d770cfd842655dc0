"""Alpaca: `instruction`, `input` and `output`, with `system` and `history` where a row has them.

Instruction and input become one question, joined by a line break.
"""

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.shapes.shape import Shape, listed, optional_text, replaced, text_of
from finetune.errors import DataError

COLUMNS = ("instruction", "input", "output", "system", "history")


def fits(row: Row) -> bool:
    return all(isinstance(row.get(column), str) for column in ("instruction", "output"))


def canonical(row: Row, where: str) -> Row:
    question = "\n".join(
        filter(None, (text_of(row, "instruction", "alpaca", where), optional_text(row, "input", where)))
    )
    if not question:
        raise DataError("has an empty `instruction` and no `input`", where=where, hint="remove the row")
    answer, made = text_of(row, "output", "alpaca", where), Row()
    if system := optional_text(row, "system", where):
        made["system"] = system
    if before := _history(row.get("history"), where):
        last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made["messages"] = [*before, *last]
    else:
        made |= {"prompt": question, "completion": answer}
    return replaced(row, COLUMNS, made, "conversation", where)


def _history(value: object, where: str) -> list[Row]:
    """The earlier questions and answers as messages."""
    pairs = listed(value)
    if pairs is None or pairs == "" or pairs == []:
        return []
    if not isinstance(pairs, list):
        raise DataError(f"`history` must be a list of [question, answer], not {kind_of(pairs)}", where=where)
    made: list[Row] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise DataError(f"`history[{number}]` must be [question, answer], both text", where=where)
        made += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return made


SHAPE = Shape("conversation", fits, canonical)
