"""Texts that are empty, stand for a missing value, repeat the prompt, or repeat themselves."""

import re
from collections.abc import Iterator

import numpy as np

from finetune.data.checks.looked import Context, Found, Looked, shown

MISSING = {
    "nan",
    "none",
    "null",
    "undefined",
    "n/a",
    "#n/a",
    "nil",
    "[object object]",
    "todo",
    "tbd",
    "lorem ipsum",
    "placeholder",
}
VARIABLE = re.compile(r"\{\{-?\s*([A-Za-z_]\w*)\s*-?\}\}|\$\{([A-Za-z_]\w*)\}")
# Names of columns and of a prompt's fields; a text about templates mostly has others.
FIELD_NAMES = frozenset(
    (
        *("input", "instruction", "question", "answer", "prompt", "completion", "output", "response", "context"),
        *("text", "user_input", "query", "document", "documents", "system", "user", "assistant", "message", "messages"),
    )
)
CODE = re.compile(r"`|\{%|^ {4}|^\t", re.MULTILINE)  # there, variables are what the text is about
LOOP = re.compile(r"(?<!\w)((?:[^\W\d_]\w*\W{1,3}){1,8}?)\1{11,}")
LONGEST_LOOKED = 200_000  # characters of a text in which repetition is looked for


def empty(looked: Looked) -> Iterator[str]:
    if not any(part.text.strip() for part in looked.parts):
        if looked.parts or looked.refusal is None:  # else the refusal says more
            yield "has no text"
        return
    for part in looked.parts:
        is_content = part.place.endswith(("content", "text", "system"))
        if is_content and not part.text.strip() and not _has_calls(looked, part.place):
            yield f"`{part.place.removesuffix('.content')}` ({part.role}) is empty"


def _has_calls(looked: Looked, place: str) -> bool:
    message = place.rpartition(".")[0]
    return any(part.place.startswith(f"{message}.tool_calls") for part in looked.parts)


def missing_values(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if part.role in ("user", "assistant", "text") and part.text.strip().lower() in MISSING:
            yield f"`{part.place}` ({part.role}) is {shown(part.text)}, which stands for a missing value"


def variables(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if "{" not in part.text or CODE.search(part.text):
            continue
        for match in VARIABLE.finditer(part.text):
            name = match[1] or match[2]
            if name.lower() in FIELD_NAMES or name in looked.columns:
                yield f"`{part.place}` has a variable that was not filled in: {match[0]}"
                break


def echoes(looked: Looked) -> Iterator[str]:
    asked = {part.text.strip() for part in looked.prompts}
    for part in looked.answers:
        if part.text.strip() and part.text.strip() in asked:
            yield f"`{part.place}` (assistant) repeats the prompt: {shown(part.text)}"


def loops(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        if part.role in ("assistant", "text") and (match := LOOP.search(part.text[:LONGEST_LOOKED])):
            times = len(match[0]) // len(match[1])
            yield f"`{part.place}` repeats {shown(match[1].strip())} {times} times in a row"


class ShortAnswers:
    """Answers of one character, where most are longer: as labels they are fine."""

    def __init__(self, context: Context):
        self._answers = 0
        self._found: list[Found] = []

    def look(self, looked: Looked) -> Iterator[Found]:
        for part in looked.answers:
            self._answers += bool(part.text.strip())
            if len(part.text.strip()) == 1:
                message = f"`{part.place}` (assistant) is one character: {shown(part.text.strip())}"
                self._found.append(Found(looked.row, looked.where, message))
        return iter(())

    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        if len(self._found) * 2 < self._answers:
            yield from self._found
