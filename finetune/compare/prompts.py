"""Prompts in one form, from a file of rows or from the command line: what a model is asked, without an answer."""

from collections.abc import Sequence
from typing import NamedTuple

from finetune.compare.generation.answerer import Answerer
from finetune.compare.generation.answers import Question
from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.refusals import together
from finetune.data.roles import known_role
from finetune.data.shapes import SHAPES
from finetune.data.shapes.choice import choice_of
from finetune.data.sources.open import open_source
from finetune.errors import DataError
from finetune.recipe.schema import Source
from finetune.recipe.schema.source_rules import TEXT_ENDINGS, ending_of

ANSWER = "."
"""Stands in the place of every answer: a row of a chat has one. No model is ever given it."""
ANSWERS = ("completion", "output")
"""Columns of an answer; with the one or the other, any row with a question has a shape."""
REPLACED = ("messages", "prompt", "completion", "label")


class Prompt(NamedTuple):
    where: str
    """Its place, for messages."""
    row: Row
    """`prompt`, `completion` and what a chat row has beside them; or `input_ids`."""
    text: str | None
    """The prompt as it is a text alone: the only message of a user, or the beginning of a text."""

    @property
    def shown(self) -> object:
        """Its text, messages or tokens, as JSON."""
        return self.text if self.text is not None else self.row.get("prompt", self.row.get("input_ids"))


def of_text(text: str, where: str) -> Prompt:
    return Prompt(where, {"prompt": [{"role": "user", "content": text}], "completion": ANSWER}, text)


def of_file(path: str) -> list[Prompt]:
    """The prompts of a file: its lines, if it is text; else its rows. DataError with every bad one, by file and line."""
    source = Source(path=path, row="line" if ending_of(path) in TEXT_ENDINGS else None)
    rows = open_source(source, is_first_read=False)
    found, bad = [], []
    for number in range(len(rows)):
        try:
            found.append(_of_row(rows[number], rows.where(number), source))
        except DataError as error:
            bad.append(error)
    if bad:
        raise together(bad, len(rows))
    return found


def _of_row(row: Row, where: str, source: Source) -> Prompt:
    """The prompt in a row of any shape. Other than in training, the rows of a file may have several."""
    row = _answered(row)
    form = "text" if _has_shape(row, "text") and not _has_shape(row, "conversation") else "conversation"
    made = choice_of(source, form, [(row, where)]).shape.canonical(row, where)
    return of_conversation(made, where) if form == "conversation" else _of_text_row(made, where)


def _answered(row: Row) -> Row:
    """The row with an answer: shapes are told by questions and answers."""
    missing = ({column: ANSWER} for column in ANSWERS if row.get(column) is None)
    tries = (row, *(row | answer for answer in missing))
    return next((made for made in tries if _has_shape(made, "conversation")), row)


def _has_shape(row: Row, form: str) -> bool:
    return any(shape.fits(row) for shape in SHAPES.values() if shape.form == form)


def of_conversation(row: Row, where: str) -> Prompt:
    """The prompt in a chat row: everything before its last answer, or all of it."""
    given = row.get("messages")
    if given is None:
        given = row.get("prompt")
    elif isinstance(given, list) and given and _is_answer(given[-1]):
        given = given[:-1]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if given is None:
        columns = ", ".join(sorted(row)) or "none"
        hint = "name the column of the question `prompt`, or give `messages`"
        raise DataError(f"has no prompt; its columns are: {columns}", where=where, hint=hint)
    if not isinstance(given, list):
        raise DataError(f"its prompt must be text or a list of messages, not {kind_of(given)}", where=where)
    if not given:
        raise DataError("has no message before its answer", where=where, hint="remove the row")
    others = {column: value for column, value in row.items() if column not in REPLACED}
    made = {"prompt": given, "completion": ANSWER, **others}
    is_plain = len(given) == 1 and not (row.get("system") or row.get("tools"))
    return Prompt(where, made, _text_of(given[0]) if is_plain else None)


def questions_of(answerer: Answerer, prompts: Sequence[Prompt]) -> list[Question]:
    """The prompts as a model is given them. DataError with every one that it cannot be given."""
    found, bad = [], []
    for prompt in prompts:
        try:
            found.append(Question(_ids(answerer, prompt), prompt.where))
        except DataError as error:
            bad.append(error)
    if bad:
        raise together(bad, len(prompts))
    return found


def _ids(answerer: Answerer, prompt: Prompt) -> list[int]:
    is_tokens = "input_ids" in prompt.row
    if answerer.is_conversational and answerer.converse:
        if is_tokens:
            raise DataError(f"has tokens, and {answerer.ref} is asked with messages", where=prompt.where)
        return answerer.converse(prompt.row, prompt.where)
    if prompt.text is None and not is_tokens:
        message = f"has more than the message of a user, and {answerer.ref} continues texts"
        raise DataError(message, where=prompt.where, hint="give one text for each prompt")
    return answerer.go_on(prompt.row if is_tokens else {"text": prompt.text}, prompt.where)


def _of_text_row(row: Row, where: str) -> Prompt:
    if row.get("text") is None and row.get("input_ids") is not None:
        return Prompt(where, {"input_ids": row["input_ids"]}, None)
    if not isinstance(text := row.get("text"), str):
        raise DataError(f"`text` must be text, not {kind_of(text)}", where=where)
    return of_text(text, where)


def _is_answer(message: object) -> bool:
    role = message.get("role") if isinstance(message, dict) else None
    return isinstance(role, str) and known_role(role) == "assistant"


def _text_of(message: object) -> str | None:
    """The content of a user's message that has nothing else."""
    if not isinstance(message, dict) or {*message} != {"role", "content"} or known_role(str(message["role"])) != "user":
        return None
    return message["content"] if isinstance(message["content"], str) else None
