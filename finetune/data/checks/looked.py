"""A row as checks see it, what they find in it, and what a check is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np

from finetune.data.example import Example, Row
from finetune.errors import DataError

Level = Literal["problem", "remark"]
BESIDE = ("role", "tool_call_id", "id", "type", "index")
"""Fields of messages that are only references."""
SHOWN = 60  # characters of a text in a message


class Part(NamedTuple):
    """One text of a row."""

    role: str
    """That of its message; `text` in a row of plain text."""
    place: str
    text: str


@dataclass(frozen=True)
class Looked:
    row: int
    """Counted through the training sources, then through the held-out ones."""
    where: str
    columns: Row
    parts: Sequence[Part]
    content: int
    """Hash of what the row says; equal rows have equal ones."""
    examples: Sequence[Example] = ()
    refusal: DataError | None = None
    """Why it cannot be trained on."""

    @cached_property
    def answers(self) -> list[Part]:
        return [part for part in self.parts if part.role == "assistant" and part.place.endswith(".content")]

    @cached_property
    def prompts(self) -> list[Part]:
        return [part for part in self.parts if part.role == "user"]


class Found(NamedTuple):
    row: int | None
    """None for a finding about all rows."""
    where: str
    message: str


class Looker(Protocol):
    """A check at work: it sees every row once, in their order."""

    def look(self, looked: Looked) -> Iterable[Found]: ...

    def end(self, held_out: np.ndarray) -> Iterable[Found]:
        """What shows only after the last row. `held_out` (bool) has an entry for each row."""
        ...


@dataclass(frozen=True)
class Context:
    """What a check may ask beside the row."""

    control: Sequence[str] = ()
    """The tokenizer's control tokens."""
    parts: Callable[[int], Sequence[Part]] = lambda row: ()
    """Reads the texts of a row again."""
    where: Callable[[int], str] = str
    """The place of a row."""


class Check(NamedTuple):
    level: Level
    says: str
    """What it finds, for a table."""
    start: Callable[[Context], Looker]


class EachRow:
    """A check that looks at one row at a time; it returns messages."""

    def __init__(self, messages: Callable[[Looked], Iterable[str]]):
        self._messages = messages

    def look(self, looked: Looked) -> Iterator[Found]:
        return (Found(looked.row, looked.where, message) for message in self._messages(looked))

    def end(self, held_out: np.ndarray) -> Iterator[Found]:
        return iter(())


def each(level: Level, says: str, messages: Callable[[Looked], Iterable[str]]) -> Check:
    return Check(level, says, lambda context: EachRow(messages))


def parts_of(row: Row) -> list[Part]:
    """The texts of a row of any shape; never raises."""
    if isinstance(row.get("text"), str) and "messages" not in row and "prompt" not in row:
        return [Part("text", "text", str(row["text"]))]
    parts = [Part("system", "system", str(row["system"]))] if isinstance(row.get("system"), str) else []
    for column, role in (("messages", ""), ("prompt", "user"), ("completion", "assistant")):
        given = row.get(column)
        if isinstance(given, str) and role:
            parts.append(Part(role, f"{column}.content", given))
        for number, message in enumerate(given if isinstance(given, list) else ()):
            parts += _of_message(message, f"{column}[{number}]")
    return parts


def _of_message(message: object, place: str) -> Iterator[Part]:
    if not isinstance(message, dict):
        return
    role = str(message.get("role"))
    for field, value in message.items():
        if field not in BESIDE:
            yield from (Part(role, f"{place}.{field}", text) for text in strings(value))


def strings(value: object) -> Iterator[str]:
    """Every text in a value, however deep."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left.extend(reversed(value.values()))
        elif isinstance(value, list):
            left.extend(reversed(value))


def shown(text: str) -> str:
    """A text in a message: short, and on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else f"{line[:SHOWN]}…")
