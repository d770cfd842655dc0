"""Answers for a reader: by prompt, the refs side by side."""

import io
import json
import shutil
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.compare.generate import Answer

MOST_COLUMNS = 3  # of 25 characters each at a width of 80
PROMPT_LINES = 6
GAP = 2


def listing(results: Sequence["Answer"], width: int | None = None) -> str:
    """All answers in lines of at most `width` cells, by default those of the terminal."""
    width = width or shutil.get_terminal_size().columns
    prompts = [list(some) for _, some in groupby(results, key=lambda one: one["where"])]
    if len(prompts) == 1 and len({one["ref"] for one in results}) == 1:
        return "\n\n".join(shown(one["text"]) for one in results)
    return "\n\n".join(_of_prompt(some, width, has_title=len(prompts) > 1) for some in prompts)


def shown(text: str) -> str:
    """A text with its control characters spelt: a model may write those that move a cursor, or change the title of a window."""
    return "".join(each if each in "\n\t" or unicodedata.category(each) != "Cc" else repr(each)[1:-1] for each in text)


def _of_prompt(some: Sequence["Answer"], width: int, has_title: bool) -> str:
    blocks = [_title(some[0], width)] if has_title else []
    refs = list(dict.fromkeys(one["ref"] for one in some))
    samples = [list(same) for _, same in groupby(sorted(some, key=_sample), key=_sample)]
    for number, same in enumerate(samples):
        heads = [f"{ref} ({number + 1})" for ref in refs] if len(samples) > 1 else refs
        texts = [shown(one["text"]) for one in same]
        is_wide = 1 < len(refs) <= MOST_COLUMNS
        blocks.append(_columns(heads, texts, width) if is_wide else _stacked(heads, texts))
    return "\n\n".join(blocks)


def _sample(one: "Answer") -> int:
    return one["sample"]


def _title(one: "Answer", width: int) -> str:
    """The place of a prompt and its first lines."""
    prompt = one["prompt"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    lines = _table([None], [[shown(text)]], width - 2).splitlines()
    cut = ["…"] if len(lines) > PROMPT_LINES else []
    return "\n".join([f"=== {one['where']}", *(f"> {line}".rstrip() for line in [*lines[:PROMPT_LINES], *cut])])


def _stacked(heads: Sequence[str], texts: Sequence[str]) -> str:
    return "\n".join(f"--- {head}\n{text}" for head, text in zip(heads, texts, strict=True))


def _columns(heads: Sequence[str], texts: Sequence[str], width: int) -> str:
    return _table([f"--- {head}" for head in heads], [texts], width)


def _table(heads: Sequence[str | None], rows: Sequence[Sequence[str]], width: int) -> str:
    """Columns of one width, each text wrapped in its own; without blanks at the ends of lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=any(heads))
    size = (width - GAP * (len(heads) - 1)) // len(heads)
    for head in heads:
        table.add_column(Text(head or ""), width=size, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width + GAP, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
