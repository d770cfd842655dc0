"""One column for the question and one for the answer, under one of their common names.

A row with two columns that could be the question, or two that could be the answer, is not read: nothing here guesses.
"""

from collections.abc import Iterable

from finetune.data.example import Row
from finetune.data.shapes import messages
from finetune.data.shapes.history import after
from finetune.data.shapes.patterns import written
from finetune.data.shapes.shape import SYSTEMS, Shape, refuse, replaced, system_of
from finetune.errors import DataError

QUESTIONS = (
    *("prompt", "question", "query", "instruction", "input", "inputs", "problem", "user", "human"),
    *("Question", "Prompt", "Instruction"),
)
ANSWERS = (
    *("completion", "answer", "response", "output", "outputs", "target", "targets", "solution", "reply"),
    *("assistant", "Answer", "Response", "Completion"),
)


def fits(row: Row) -> bool:
    questions, answers = _present(row, QUESTIONS), _present(row, ANSWERS)
    if questions == ["instruction"] and answers == ["output"]:
        return False  # that is `alpaca`, without an input
    return len(questions) == len(answers) == 1


def is_near(row: Row) -> bool:
    """Whether it has questions and answers, perhaps too many: then this shape says which."""
    return bool(_present(row, QUESTIONS) and _present(row, ANSWERS))


def _present(row: Row, names: Iterable[str]) -> list[str]:
    return [name for name in names if isinstance(row.get(name), str | int | float)]


def canonical(row: Row, where: str) -> Row:
    found = [_only(row, names, what, where) for names, what in ((QUESTIONS, "question"), (ANSWERS, "answer"))]
    question, answer = found
    if found == ["prompt", "completion"] and all(isinstance(row[column], str | list) for column in found):
        return messages.canonical(row, where)
    asked, answered = (written(row[column], f"`{column}`", where) for column in found)
    made = system_of(row, where) | after(row.get("history"), asked, answered, where)
    return replaced(row, (*found, "history", *SYSTEMS), made, "conversation", where)


def _only(row: Row, names: tuple[str, ...], what: str, where: str) -> str:
    present = [name for name in names if row.get(name) is not None]
    if not present:
        null = next((name for name in names if name in row), None)
        refuse("prompt", row, f"`{null}` is null" if null else f"no column is known as the {what}", where)
    if len(present) > 1:
        message = f"has {' and '.join(f'`{name}`' for name in present)}: each could be the {what}"
        raise DataError(message, where=where, hint="say which, with patterns: `prompt` and `completion` of the source")
    return present[0]


SHAPE = Shape("conversation", fits, canonical, is_near)
