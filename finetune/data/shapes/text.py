"""Raw text: `text`, or one column `content` or `document`."""

from finetune.data.example import Row
from finetune.data.shapes.shape import Shape, replaced
from finetune.errors import DataError

OTHERS = ("content", "document")


def fits(row: Row) -> bool:
    return isinstance(row.get("text"), str) or any(isinstance(row.get(name), str) for name in OTHERS)


def canonical(row: Row, where: str) -> Row:
    present = [name for name in OTHERS if isinstance(row.get(name), str)]
    if row.get("text") is not None:
        return row
    if not present:  # the task refuses it: without this it would read tokens, which no shape has checked
        return {column: value for column, value in row.items() if column != "input_ids"}
    if len(present) > 1:
        message = "has `content` and `document`: each could be the text"
        raise DataError(message, where=where, hint="say which: data.train[].columns: {text: content}")
    return replaced(row, present, {"text": row[present[0]]}, "text", where)


SHAPE = Shape("text", fits, canonical)
