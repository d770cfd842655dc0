"""The model's own answers to the rows of a set, and what metrics make of them. Answers are kept: another metric needs no model.

Rows are asked as they were encoded: the prompt is what comes before the last learnt stretch of a row, and that stretch is the expected
answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.compare.generation.answerer import open_answerer
from finetune.compare.generation.answers import Question, generated
from finetune.compare.generation.settings import Settings
from finetune.compare.results import Asked, Result, Wanted, Weights, keep, wanted_of
from finetune.compare.scores import Answered, better_of, measures, name_of, of_function, scores
from finetune.data.row_set import RowSet
from finetune.errors import DataError
from finetune.store import evaluations
from finetune.store.evaluations import About, Evaluation, Measure
from finetune.store.run.journal import now
from finetune.training.resolve import Resolved


class _Asked(NamedTuple):
    prompt: list[int]
    expected: list[int]


def with_scores(result: Result, rows: RowSet, resolved: Resolved, weights: Weights, asked: Asked) -> Result:
    """The result with what metrics make of the model's answers: those of its set in the recipe, and the user's functions."""
    loss, wanted = result.evaluation, wanted_of(resolved.plan, rows.name, asked) or Wanted((), asked.max_new_tokens)
    settings = {**loss.about["settings"], **wanted.settings}
    stored = evaluations.find(weights.folder, loss.about["data"], weights.digest, settings)
    if stored and not asked.is_again and not asked.functions:
        return replace(result, scores=stored)
    prompts = [_asked(rows, number) for number in loss.rows.tolist()]
    known = None if asked.is_again else _known(loss, wanted, weights.folder)
    answers = known or _answers(result.ref, prompts, rows.name, wanted)
    given = answered(loss, prompts, answers, resolved.tokenizer)
    made = stored if stored and not asked.is_again else None
    if made is None:
        found = _evaluation(loss, scores(wanted.metrics, given), measures(wanted.metrics), answers)
        about = {**found.about, "ref": result.ref, "settings": settings}
        made = keep(weights, replace(found, about=cast(About, about)))
    if asked.functions:
        own = {name_of(each): of_function(each, given) for each in asked.functions}
        better: dict[str, Measure] = {
            name_of(each): {"per": "rows", "better": better_of(each)} for each in asked.functions
        }
        made = _evaluation(made, {**made.columns, **own}, {**made.about["measures"], **better}, answers)
    return replace(result, is_stored=result.is_stored and known is not None, scores=made)


def _evaluation(
    of: Evaluation,
    scores: Mapping[str, Sequence[float] | np.ndarray],
    measures: Mapping[str, Measure],
    answers: list[str],
) -> Evaluation:
    """One like another, of these scores alone."""
    columns = {name: np.array(values, dtype=np.float64) for name, values in scores.items()}
    metrics = {name: float(column.mean()) for name, column in columns.items()}
    about = {**of.about, "measures": dict(measures), "metrics": metrics, "created": now()}
    return replace(of, about=cast(About, about), columns=columns, answers=answers)


def answered(
    loss: Evaluation, asked: Sequence[_Asked], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Answered]:
    """The rows with their answers, as texts."""
    means = loss.columns["loss"] / np.maximum(loss.tokens, 1)
    return [
        {
            "row": int(row),
            "prompt": cast(str, tokenizer.decode(one.prompt)),
            "answer": answer,
            "expected": cast(str, tokenizer.decode(one.expected, skip_special_tokens=True)).strip(),
            "loss": float(mean),
            "tokens": int(tokens),
        }
        for row, one, answer, mean, tokens in zip(loss.rows, asked, answers, means, loss.tokens, strict=True)
    ]


def _asked(rows: RowSet, number: int) -> _Asked:
    """The tokens of a row's prompt and of its expected answer. DataError where it has no prompt."""
    example = rows.examples[int(np.searchsorted(rows.examples.rows, number, side="right")) - 1]
    learnt = np.flatnonzero(example.supervised)
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    first, end = int(learnt[breaks[-1] + 1 if len(breaks) else 0]), int(learnt[-1]) + 1
    if first == 0:
        message = f"row {number} has no prompt: all of it is learnt"
        raise DataError(message, where=rows.name, hint="metrics need rows with a prompt and an answer")
    return _Asked(example.tokens[:first].tolist(), example.tokens[first:end].tolist())


def _known(loss: Evaluation, wanted: Wanted, folder: Path) -> list[str] | None:
    """The answers of the same weights to the same rows, if some were kept for other metrics."""
    settings = {**loss.about["settings"], **wanted.settings}
    for each in evaluations.read_all(folder):
        about = each.about
        is_same = (about["data"], about["model"]) == (loss.about["data"], loss.about["model"])
        is_asked_alike = {**about["settings"], "metrics": settings["metrics"]} == settings
        if each.answers is not None and is_same and is_asked_alike and np.array_equal(each.rows, loss.rows):
            return each.answers
    return None


def _answers(ref: str, asked: Sequence[_Asked], name: str, wanted: Wanted) -> list[str]:
    answerer = open_answerer(ref)
    questions = [Question(one.prompt, f"{name}, question {number}") for number, one in enumerate(asked, 1)]
    found = generated(answerer, questions, Settings(max_new_tokens=wanted.max_new_tokens))
    texts = {one.question: one.text.strip() for one in found}
    return [texts[number] for number in range(len(asked))]
