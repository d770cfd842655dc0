"""The evaluations of the refs of a comparison, on one set of rows, and the sources of these rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from finetune.compare.compare import Candidate, Question, compare
from finetune.compare.evaluate import results
from finetune.compare.origins import origins
from finetune.compare.results import Asked, Result, set_names
from finetune.compare.shown import Comparison
from finetune.data.reread import Reread, held_out_rows, rows_of_set, rows_of_sources
from finetune.errors import DataError
from finetune.recipe.load import load
from finetune.recipe.schema import HELD_OUT, Source
from finetune.store.checkpoints.refs import parse, run_of
from finetune.store.run.directory import RunDirectory


class Found(NamedTuple):
    candidates: list[Candidate]
    sources: Reread | None
    """Through which the rows of the first candidate are counted; None where that is not known."""
    notes: list[str]


def compared(texts: Sequence[str], asked: Asked, rows: str | None, question: Question) -> Comparison:
    """Refs on a set of rows: the named one, or else the first that is asked for. What is stored is not computed again."""
    found = candidates(texts, asked, rows)
    facts = compare(found.candidates, question, found.sources)
    return {**facts, "notes": [*found.notes, *facts["notes"]]}


def candidates(texts: Sequence[str], asked: Asked, rows: str | None) -> Found:
    """Of refs on a set of rows: the named one, or else the first. A ref that belongs to no run is evaluated on the rows of the first run,
    if no others are given."""
    texts = list(dict.fromkeys(texts))
    runs = {text: run_of(parse(text)) for text in texts}
    first = next(filter(None, runs.values()), None)
    if rows and not asked.files:
        asked = replace(asked, rows=(rows,))
    lent = [text for text in texts if first and not runs[text] and not asked.recipe and not asked.files]
    made = results([text for text in texts if text not in lent], asked)
    if lent and first:
        made += results(lent, replace(asked, recipe=RunDirectory(first).recipe))
    name = rows or (set_names(asked.files)[0] if asked.files else HELD_OUT)
    of_set = {result.ref: result for result in made if result.rows == name}
    if missing := [text for text in texts if text not in of_set]:
        known = ", ".join(dict.fromkeys(result.rows for result in made))
        raise DataError(f"has no rows named `{name}`", where=missing[0], hint=f"the sets of rows are: {known}")
    found = [Candidate(origin, of_set[origin.text].evaluation) for origin in origins(texts)]
    run = first if texts[0] in lent else runs[texts[0]]
    notes = [note for text in texts for note in _seen(of_set[text])]
    test_sets = {each.origin.plan.recipe.evaluate.test_set for each in found if each.origin.plan}
    if name in test_sets and not asked.files:
        notes.append(f"{name} is evaluate.test_set: if you choose by it, its figures on a card are too good")
    return Found(found, _sources(asked, run, name), notes)


def _sources(asked: Asked, run: Path | None, name: str) -> Reread | None:
    if asked.recipe:
        recipe = load(asked.recipe, asked.overrides).recipe
        if name != HELD_OUT:
            return rows_of_sources(recipe.evaluate.sets[name].rows, recipe.task)
        given = recipe.data.holdout
        return rows_of_sources(given if isinstance(given, list) else recipe.data.train, recipe.task)
    if run is None:
        return None
    plan, _ = RunDirectory(run).plan()
    if asked.files:
        file = asked.files[set_names(asked.files).index(name)]
        return rows_of_sources([Source(path=file)], plan.recipe.task)
    return held_out_rows(plan) if name == HELD_OUT else rows_of_set(plan, name)


def _seen(result: Result) -> list[str]:
    return [f"{result.ref}: {item.told(len(result.evaluation.rows))}" for item in result.found.seen]
