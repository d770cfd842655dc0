"""Alpaca: `instruction`, `input` and `output`, with `system` and `history` where a row has them.

Instruction and input become one question, joined by a line break.
"""

from finetune.data.example import Row
from finetune.data.shapes.history import after
from finetune.data.shapes.shape import SYSTEMS, Shape, optional_text, replaced, system_of, text_of
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
    answer = text_of(row, "output", "alpaca", where)
    made = system_of(row, where) | after(row.get("history"), question, answer, where)
    return replaced(row, (*COLUMNS, *SYSTEMS), made, "conversation", where)


SHAPE = Shape("conversation", fits, canonical)
