"""Held-out figures of anything a ref can name. What is stored is not computed again, and needs no model."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, cast

from finetune.compare.results import Asked, Result, stored
from finetune.plan.facts import Metrics
from finetune.store.checkpoints.refs import parse
from finetune.store.checkpoints.store import Store


class SeenBy(TypedDict):
    """`Seen`, as JSON."""

    by: str
    rows: int | None
    why: str


class Evaluated(TypedDict):
    """A result of `evaluate --json`."""

    ref: str
    set: str
    """The name of the rows: `held-out`, an evaluation set of the recipe, or a file."""
    metrics: Metrics
    seen_rows: int | None
    """Rows that whatever trained what the ref names had; None where that cannot be found out."""
    seen: list[SeenBy]
    is_comparable: bool
    is_stored: bool
    """Whether the figures were computed before."""


def evaluate(
    texts: Sequence[str],
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    is_seen_allowed: bool = False,
    *,
    files: Sequence[str] = (),
    is_again: bool = False,
) -> list[Evaluated]:
    """One for each ref and each set of rows: the held-out rows and evaluation sets of `recipe`, or else of each ref's own run; or those of
    files. Figures are comparable where these are the rows of the first ref.

    DataError where a run that trained what a ref names, or may have, had some of the rows, unless that is allowed: then `seen_rows` says
    how many of them it had; None where that cannot be found out.
    """
    return shown(results(texts, Asked(recipe, overrides, files, is_seen_allowed, is_again)))


def results(texts: Sequence[str], asked: Asked) -> list[Result]:
    """The same with the results of each row."""
    known = {text: stored(text, asked) for text in texts}
    missing = [text for text, found in known.items() if found is None]
    if missing:
        from finetune.compare.measure import Measurer  # here: it imports torch

        made = Measurer(asked, texts).results(missing)
        known |= {text: [result for result in made if result.ref == text] for text in missing}
    return [result for text in texts for result in known[text] or ()]


def shown(results: Iterable[Result]) -> list[Evaluated]:
    first: dict[str, str] = {}
    return [
        {
            "ref": result.ref,
            "set": result.rows,
            "metrics": {name: _number(value) for name, value in _metrics(result).items()},
            "seen_rows": result.found.rows,
            "seen": [cast(SeenBy, item.model_dump()) for item in result.found.seen],
            "is_comparable": first.setdefault(result.rows, result.evaluation.about["data"])
            == result.evaluation.about["data"],
            "is_stored": result.is_stored,
        }
        for result in results
    ]


def _metrics(result: Result) -> Metrics:
    return result.evaluation.about["metrics"] | (result.scores.about["metrics"] if result.scores else {})


def every_checkpoint(texts: Sequence[str]) -> Iterator[str]:
    """The refs, with all its checkpoints in place of a run that is named without a step."""
    for text in texts:
        ref = parse(text)
        if ref.kind == "run" and ref.is_implied:
            yield from (f"{text}@{item.step}" for item in Store(ref.run).summaries())
        else:
            yield text


def _number(value: float) -> float:
    """A figure that is not finite is a name in a file."""
    return float(value) if isinstance(value, str) else value
