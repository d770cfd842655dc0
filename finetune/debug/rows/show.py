"""`data show`: rows as the tokens they become, each with the reason why it is learnt or not, before and after cutting."""

from collections.abc import Sequence
from itertools import islice
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from finetune.data.checks.looked import parts_of
from finetune.data.checks.tokens import TOO_LONG
from finetune.errors import DataError, FinetuneError, counted
from finetune.recipe.load import LoadedRecipe
from finetune.tasks.task import Explain, Explained
from finetune.training.encoding import explain_of
from finetune.training.recipe_rows import OpenedSource, RecipeRows, open_encoding, open_rows

CUT = "task.max_length cuts it away"
FIRST = "the first token of an example is never predicted"


class Token(TypedDict):
    id: int
    text: str
    trained: bool
    """Whether it is learnt, after cutting."""
    reason: str
    kept: bool
    """False if it is cut away."""
    start: int
    """Its first character in the text of the example."""
    end: int


class ShownExample(TypedDict):
    row: int
    """Counted through the sources."""
    source: str
    where: str
    part: int
    """Number of the example, where a row becomes several."""
    text: str
    tokens: list[Token]
    learnt: int
    cut: int
    refused: str | None
    """Why the row cannot be trained on; it has no tokens then."""
    hint: str | None
    """What to do about it."""


class Shown(TypedDict):
    examples: list[ShownExample]
    notes: list[str]
    """About the templates of the base."""


def show(loaded: LoadedRecipe, source: str | None, first: int, chosen: Sequence[int]) -> Shown:
    """The first rows of the sources, or those with the chosen numbers: counted within the source, or through all sources."""
    rows, encoding = open_rows(loaded), open_encoding(loaded)
    explain = explain_of(encoding)
    examples: list[ShownExample] = []
    for opened, row in _chosen(rows, source, first, chosen):
        examples += _of_row(opened, row, explain, encoding.tokenizer)
    return {"examples": examples, "notes": [*encoding.templates]}


def _chosen(rows: RecipeRows, source: str | None, first: int, chosen: Sequence[int]) -> list[tuple[OpenedSource, int]]:
    sources = rows.named(source)
    if not chosen:
        return [*islice(((opened, row) for opened in sources for row in opened.numbers), first)]
    if source is None:
        return [(rows.of(row), row) for row in chosen]
    if len(sources) > 1:
        keys = " or ".join(f"`{opened.key}`" for opened in sources)
        raise FinetuneError(f"several sources are `{source}`", hint=f"give --source {keys}")
    [only] = sources
    for row in chosen:
        if row >= len(only.rows):
            raise DataError(f"there is no row {row:,}", where=source, hint=f"its rows are 0 to {len(only.rows) - 1:,}")
    return [(only, only.first + row) for row in chosen]


def _of_row(opened: OpenedSource, row: int, explain: Explain, tokenizer: PreTrainedTokenizerBase) -> list[ShownExample]:
    where = opened.rows.where(row - opened.first)
    shown: ShownExample = {
        "row": row,
        "source": opened.key,
        "where": where,
        "part": 0,
        "text": "",
        "tokens": [],
        "learnt": 0,
        "cut": 0,
        "refused": None,
        "hint": None,
    }
    try:
        columns = opened.rows[row - opened.first]
        characters = sum(len(part.text) for part in parts_of(columns))
        if characters > TOO_LONG:
            raise DataError(f"has {counted(characters, 'character')}: its tokens are not looked at", where=where)
        explained = explain(columns, where)
    except DataError as error:
        return [{**shown, "refused": error.message, "hint": error.hint}]
    return [{**shown, "part": part, **_tokens(each, tokenizer)} for part, each in enumerate(explained)]


class _Tokens(TypedDict):
    text: str
    tokens: list[Token]
    learnt: int
    cut: int


def _tokens(explained: Explained, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    tokens: list[Token] = []
    facts = zip(
        explained.tokens.tolist(),
        explained.offsets.tolist(),
        explained.supervised.tolist(),
        explained.reasons,
        strict=True,
    )
    for place, (number, (start, end), is_learnt, reason) in enumerate(facts):
        kept = place < explained.kept
        reason = FIRST if is_learnt and place == 0 else reason
        tokens.append(
            {
                "id": number,
                "text": explained.text[start:end] or str(tokenizer.convert_ids_to_tokens(number)),
                "trained": is_learnt and kept and place > 0,
                "reason": reason if kept else f"{CUT}; before cutting: {reason}",
                "kept": kept,
                "start": start,
                "end": end,
            }
        )
    learnt = sum(token["trained"] for token in tokens)
    return {"text": explained.text, "tokens": tokens, "learnt": learnt, "cut": len(tokens) - explained.kept}
