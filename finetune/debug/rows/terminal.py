"""`data show` for a terminal or a pipe: learnt text is marked, and blanks, control characters and cuts are visible."""

from collections.abc import Iterator
from itertools import groupby

import click

from finetune.data.visible import visible
from finetune.debug.rows.show import Shown, ShownExample, Token
from finetune.errors import counted

LEARNT, CUT = ("⟦", "⟧"), ("⟪", "⟫")


def text(shown: Shown, numbers: tuple[int, ...], is_colored: bool) -> str:
    """All examples; `numbers` are tokens to explain one by one."""
    legend = "learnt text is green, cut text is struck through" if is_colored else "⟦learnt⟧ ⟪cut away⟫"
    parts = [f"{legend}; · is a blank, ↵ the end of a line", *(f"note: {note}" for note in shown["notes"])]
    for example in shown["examples"]:
        parts += ["", _head(example)]
        if example["refused"] is not None:
            parts.append(f"refused: {visible(example['refused'])}")
            parts += [f"hint: {visible(example['hint'])}"] if example["hint"] else []
            continue
        parts.append(marked(example, is_colored))
        parts += [_token(example, number) for number in numbers]
    return "\n".join(parts)


def _head(example: ShownExample) -> str:
    place = f"row {example['row']:,} of {example['source']}, {example['where']}"
    if example["part"]:
        place += f", part {example['part'] + 1}"
    if example["refused"] is not None:
        return place
    counts = f"{counted(len(example['tokens']), 'token')}, {example['learnt']:,} learnt"
    counts += f", {example['cut']:,} cut away" if example["cut"] else ""
    counts += "; the row is skipped, since nothing is learnt" if not example["learnt"] else ""
    return f"{place}: {counts}"


def _token(example: ShownExample, number: int) -> str:
    if number >= len(example["tokens"]):
        return f"token {number:,}: there are {len(example['tokens']):,}"
    token = example["tokens"][number]
    state = "learnt: " if token["trained"] else "not learnt: "
    said = state + token["reason"].removeprefix(state)
    return f"token {number:,} (id {token['id']}) {visible(token['text'])!r}: {said}"


def marked(example: ShownExample, is_colored: bool) -> str:
    written = []
    for kind, some in groupby(segments(example), key=lambda segment: segment[0]):
        joined = "".join(visible(example["text"], start, end) for _, start, end in some)
        written.append(_colored(joined, kind) if is_colored else _between(joined, kind))
    return "".join(written).rstrip("\n")


def segments(example: ShownExample) -> Iterator[tuple[str, int, int]]:
    """The text of an example in pieces: what a piece is (learnt, cut, or neither), its first and its last character.

    Several tokens may share a character, and a text may have characters without a token.
    """
    place = 0
    for token in example["tokens"]:
        start, end = max(place, token["start"]), max(place, token["end"])
        if start > place:
            yield "", place, start
        if end > start:
            yield kind_of(token), start, end
        place = end
    if place < len(example["text"]):
        yield "", place, len(example["text"])


def kind_of(token: Token) -> str:
    return "cut" if not token["kept"] else "learnt" if token["trained"] else ""


def _between(written: str, kind: str) -> str:
    marks = {"learnt": LEARNT, "cut": CUT}.get(kind)
    return f"{marks[0]}{written}{marks[1]}" if marks else written


def _colored(written: str, kind: str) -> str:
    """Each line by itself: a terminal may lose a color at the end of a line."""
    if not kind:
        return written
    style = {"fg": "green", "bold": True} if kind == "learnt" else {"dim": True, "strikethrough": True}
    return "\n".join(click.style(line, **style) if line else line for line in written.split("\n"))
