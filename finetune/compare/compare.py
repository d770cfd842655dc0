"""Compares models on the same rows: which of them are better than the first, and which the rows cannot tell apart.

It reads results of evaluations and computes no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.compare.changes import changed_rows
from finetune.compare.origins import Origin, recipe_differences
from finetune.compare.paired import Paired, paired
from finetune.compare.shown import Comparison, Pair, Result
from finetune.data.reread import Reread
from finetune.errors import DataError, FinetuneError, counted
from finetune.plan.statistics import choice
from finetune.plan.statistics import judge as judging
from finetune.plan.statistics.judge import FEWEST_UNITS, Figure
from finetune.plan.statistics.sample import Sample
from finetune.store.evaluations import Evaluation


@dataclass(frozen=True)
class Question:
    metric: str = "loss"
    baseline: str | None = None
    """A ref; the first one without it."""
    margin: float | None = None
    """The difference that does not matter."""
    cluster: str | None = None
    """A column of the rows."""
    changed: int = 3
    """Rows to show for each pair."""


@dataclass(frozen=True)
class Candidate:
    origin: Origin
    evaluation: Evaluation

    @property
    def ref(self) -> str:
        return self.origin.text


@dataclass(frozen=True)
class _Judged:
    """By the numbers of all candidates; those with rows that are NaN or infinite are in none."""

    figures: dict[int, Figure]
    pairs: dict[int, judging.Pair]
    best: int


def compare(candidates: Sequence[Candidate], question: Question, sources: Reread | None) -> Comparison:
    """DataError where the candidates have no rows in common, or not the measure or column that is asked for. Texts come from `sources`,
    through which the rows of the first candidate are counted."""
    refs = [each.ref for each in candidates]
    if question.baseline and question.baseline not in refs:
        hint = f"the refs are {', '.join(refs)}"
        raise FinetuneError(f"the baseline `{question.baseline}` is not one of the refs", hint=hint)
    baseline = refs.index(question.baseline) if question.baseline else 0
    found = paired([each.evaluation for each in candidates], question.metric)
    sample = found.sample(_clusters(found, question.cluster, sources) if question.cluster else None)
    judged = _judge(found, sample, baseline, question.margin)
    others = [model for model in range(len(refs)) if model != baseline]
    pairs = [_pair(model, judged, candidates, baseline, found, question.changed) for model in others]
    unread = _add_texts(pairs, sources)
    return {
        "metric": question.metric,
        "better": found.measure["better"],
        "per": found.measure["per"],
        "set": candidates[0].evaluation.about["set"],
        "rows": len(found.rows),
        "tokens": int(found.weights.sum()) if found.measure["per"] == "tokens" else 0,
        "cluster": question.cluster,
        "clusters": sample.units if question.cluster else None,
        "margin": question.margin,
        "baseline": refs[baseline],
        "results": [_result(model, each, found, judged) for model, each in enumerate(candidates)],
        "pairs": pairs,
        "best": refs[judged.best],
        "leaders": [refs[found.sound[place]] for place in choice.leaders(sample, found.measure["better"])],
        "notes": [*_notes(refs, found, sample, baseline), *_seeds(candidates, pairs), *unread],
    }


def _judge(found: Paired, sample: Sample, baseline: int, margin: float | None) -> _Judged:
    if baseline not in found.sound:
        figures = judging.judge(sample).figures if found.sound else []
        return _Judged(dict(zip(found.sound, figures, strict=True)), {}, baseline)
    at, better = found.sound.index(baseline), found.measure["better"]
    judged = judging.judge(sample, at, better, margin)
    pairs = {found.sound[pair.model]: pair for pair in judged.pairs}
    return _Judged(dict(zip(found.sound, judged.figures, strict=True)), pairs, found.sound[judged.best(at, better)])


def _clusters(found: Paired, column: str, sources: Reread | None) -> np.ndarray:
    if sources is None:
        raise DataError(f"the rows are not at hand, so their column `{column}` is unknown", hint="leave out --cluster")
    _, numbers = np.unique(np.array(sources.column(column, found.rows.tolist())), return_inverse=True)
    return np.asarray(numbers, dtype=np.int64)


def _result(model: int, candidate: Candidate, found: Paired, judged: _Judged) -> Result:
    figure = judged.figures.get(model)
    return {
        "ref": candidate.ref,
        "value": float(found.values[model]),
        "interval": figure.interval if figure else None,
        "unpaired_rows": found.unpaired[model],
        "not_finite_rows": found.not_finite[model],
        **candidate.origin.cost,
    }


def _pair(
    model: int, judged: _Judged, candidates: Sequence[Candidate], baseline: int, found: Paired, changed: int
) -> Pair:
    pair, (one, two) = judged.pairs.get(model), (candidates[baseline], candidates[model])
    is_told = pair is not None and pair.verdict is not None
    evaluations = [each.evaluation for each in candidates]
    return {
        "a": one.ref,
        "b": two.ref,
        "difference": float(found.values[model] - found.values[baseline]),
        "interval": pair.interval if pair else None,
        "interval_of_all": pair.at_once if pair else None,
        "p_value": pair.p_value if pair and is_told else None,
        "p_corrected": pair.corrected if pair and is_told else None,
        "smallest": pair.smallest if pair else None,
        "verdict": pair.verdict if pair else None,
        "won": pair.won if pair else 0,
        "lost": pair.lost if pair else 0,
        "recipe": recipe_differences(one.origin.plan, two.origin.plan),
        "changed": changed_rows(found, evaluations, baseline, model, changed),
    }


def _add_texts(pairs: Sequence[Pair], sources: Reread | None) -> list[str]:
    """Fills in the texts of rows; says why where they cannot be read."""
    rows = [row for pair in pairs for row in pair["changed"]]
    if not rows or sources is None:
        return []
    try:
        texts = sources.texts({row["row"] for row in rows})
    except DataError as error:
        return [f"no texts of rows: {': '.join(filter(None, (error.where, error.message)))}"]
    for row in rows:
        row["text"] = texts.get(row["row"])
    return []


def _seeds(candidates: Sequence[Candidate], pairs: Sequence[Pair]) -> list[str]:
    steps = {each.ref: each.origin.step for each in candidates}
    return [
        f"{pair['a']} and {pair['b']} are two seeds of one recipe: their difference is that of the seeds"
        for pair in pairs
        if {entry["key"] for entry in pair["recipe"]} == {"train.seed"} and steps[pair["a"]] == steps[pair["b"]]
    ]


def _notes(refs: Sequence[str], found: Paired, sample: Sample, baseline: int) -> list[str]:
    """What a reader of the verdicts has to know beside them."""
    notes = [
        f"{ref}: {counted(count, 'row')} not compared: another ref does not have {'it' if count == 1 else 'them'}, in the same tokens"
        for ref, count in zip(refs, found.unpaired, strict=True)
        if count
    ]
    if found.skipped:
        notes.append(f"{counted(found.skipped, 'row')} skipped: NaN or infinite for every ref")
    notes += [
        f"{ref}: {counted(count, 'row')} NaN or infinite, so there is no interval and no verdict"
        for ref, count in zip(refs, found.not_finite, strict=True)
        if count
    ]
    if baseline not in found.sound:
        notes.append("the baseline has such rows, so there are no verdicts: name another one with --baseline")
    if sample.units < FEWEST_UNITS:
        notes.append(f"fewer than {FEWEST_UNITS} rows or clusters are paired, so there are no verdicts")
    equal = [
        refs[model]
        for model in found.sound
        if model != baseline and np.array_equal(found.sums[model], found.sums[baseline])
    ]
    return [*notes, *(f"{ref} has the same figures as the baseline in every row" for ref in equal)]
