"""What stored evaluations say of checkpoints: intervals of their figures, differences to a baseline, and the rows that changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from finetune.compare.changes import changed_rows
from finetune.compare.paired import Paired, metrics_of, paired
from finetune.compare.series import Series
from finetune.compare.shown import ChangedRow
from finetune.data.reread import LONGEST, held_out_rows
from finetune.errors import DataError, FinetuneError
from finetune.plan.statistics.judge import Figure, Pair, judge
from finetune.plan.statistics.sample import Sample
from finetune.store import evaluations
from finetune.store.evaluations import HELD_OUT, Evaluation
from finetune.store.run.directory import RunDirectory, step_of

MOST = 1000
"""Evaluations of all runs together that are compared; of more, every second, third, … one, and the last."""
SAMPLES, MOST_SAMPLES, FEWEST_SAMPLES = 12, 60, 4
"""Rows shown for each run; of all runs together; and for each of very many runs."""


class Key(NamedTuple):
    """A figure of an evaluation."""

    run: int
    set: str
    metric: str
    step: int


class Sampled(TypedDict):
    """Rows of a run beside those of the baseline, those that changed most first."""

    a: str
    b: str
    metric: str
    rows: list[ChangedRow]
    note: str
    """Why there are no texts."""


@dataclass(frozen=True)
class _Item:
    run: int
    step: int
    evaluation: Evaluation


@dataclass
class Evidence:
    baselines: dict[str, str] = field(default_factory=dict)
    """The ref that others are compared with, by set of rows."""
    figures: dict[Key, Figure] = field(default_factory=dict)
    pairs: dict[Key, Pair] = field(default_factory=dict)
    samples: list[Sampled] = field(default_factory=list)


def files_of(series: Sequence[Series]) -> list[list[Path]]:
    """The stored evaluations of each run; a file never changes, so equal lists are equal evidence."""
    return [sorted(RunDirectory(each.run).evaluations.glob("*/*.parquet")) for each in series]


def evidence(series: Sequence[Series], files: Sequence[Sequence[Path]], baseline: str | None) -> Evidence:
    """Every evaluation against that of the baseline on the same rows: a ref like `runs/a@400`, or else the first run's first one.

    FinetuneError if there is no evaluation of that ref.
    """
    groups: dict[tuple[str, str], list[_Item]] = {}
    for run, paths in enumerate(files):
        every = max(1, -(-len(paths) * len(files) // MOST))
        for item in _items(run, paths[::-every]):
            about = item.evaluation.about
            groups.setdefault((about["set"], about["data"]), []).append(item)
    found = Evidence()
    for (name, _), items in groups.items():
        refs = [f"{series[item.run].run}@{item.step}" for item in items]
        if baseline is not None and baseline not in refs:
            continue
        first = refs.index(baseline) if baseline else 0
        if name in found.baselines:  # of other rows, by another run
            continue
        found.baselines[name] = refs[first]
        _judge(found, items, first)
        if name == HELD_OUT:
            found.samples = _samples(series, items, first, refs)
    if baseline is not None and not found.baselines:
        hint = f"evaluate it: finetune evaluate {baseline}"
        raise FinetuneError(f"no evaluation of `{baseline}` is stored in these runs", where="--baseline", hint=hint)
    return found


def _items(run: int, paths: Sequence[Path]) -> list[_Item]:
    """The newest evaluation of each step and set of rows."""
    newest: dict[tuple[int, str, str], Evaluation] = {}
    for path in paths:
        evaluation, step = _read(path), step_of(path.parent.name)
        if evaluation is None or step is None:  # damaged, or of a newer version
            continue
        key = (step, evaluation.about["set"], evaluation.about["data"])
        if key not in newest or newest[key].about["created"] < evaluation.about["created"]:
            newest[key] = evaluation
    return [_Item(run, step, evaluation) for (step, *_), evaluation in sorted(newest.items(), key=lambda each: each[0])]


@lru_cache(maxsize=4096)
def _read(path: Path) -> Evaluation | None:
    return evaluations.read(path)


def _judge(found: Evidence, items: Sequence[_Item], baseline: int) -> None:
    """Adds the figures of all items and their differences to one of them, for each measure that all have."""
    for metric in metrics_of([item.evaluation for item in items]):
        try:
            rows = paired([item.evaluation for item in items], metric)
        except DataError:  # no row in common, or none that is finite
            continue
        if baseline not in rows.sound:
            continue
        judged = judge(rows.sample(), rows.sound.index(baseline), rows.measure["better"])
        keys = [_key(items[place], metric) for place in rows.sound]
        found.figures |= dict(zip(keys, judged.figures, strict=True))
        found.pairs |= {keys[pair.model]: pair for pair in judged.pairs}


def _key(item: _Item, metric: str) -> Key:
    return Key(item.run, item.evaluation.about["set"], metric, item.step)


def _samples(series: Sequence[Series], items: Sequence[_Item], baseline: int, refs: Sequence[str]) -> list[Sampled]:
    last = {item.run: place for place, item in enumerate(items)}
    found = []
    for place in last.values():
        if place == baseline:
            continue
        two = [items[baseline].evaluation, items[place].evaluation]
        try:
            rows = min((paired(two, metric) for metric in metrics_of(two)), key=_rank)
        except (DataError, ValueError):  # nothing to compare
            continue
        count = max(FEWEST_SAMPLES, min(SAMPLES, MOST_SAMPLES // len(last)))
        changed = changed_rows(_extremes(rows, count), two, 0, 1, count)
        _shorten(changed)
        note = _add_texts(series[items[baseline].run], changed)
        found.append(Sampled(a=refs[baseline], b=refs[place], metric=rows.metric, rows=changed, note=note))
    return found


def _shorten(rows: Sequence[ChangedRow]) -> None:
    for row in rows:
        for key in ("answer_a", "answer_b"):
            if len(answer := str(row.get(key, ""))) > LONGEST:
                row[key] = f"{answer[:LONGEST]}…"


def _extremes(rows: Paired, count: int) -> Paired:
    """The rows that became worse by the most, then those that became better by the most: of flips there may be too many of one kind."""
    losses = (rows.sums[1] - rows.sums[0]) * (1 if rows.measure["better"] == "lower" else -1)
    order = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")
    worse, better = order[losses[order] > 0], order[::-1][losses[order[::-1]] < 0]
    half = count // 2
    chosen = np.concatenate([worse[: max(half, count - len(better))], better[: max(half, count - len(worse))]])
    return replace(
        rows,
        contents=rows.contents[chosen],
        rows=rows.rows[chosen],
        sums=rows.sums[:, chosen],
        weights=rows.weights[chosen],
    )


def _rank(rows: Paired) -> tuple[bool, bool]:
    """Measures that are right or wrong come first: then a change is a flip."""
    return (not Sample(rows.sums, rows.weights).is_binary, rows.metric != "loss")


def _add_texts(series: Series, rows: Sequence[ChangedRow]) -> str:
    """Fills in texts of the rows; returns why they cannot be read, or nothing."""
    try:
        texts: Mapping[int, str] = held_out_rows(series.plan).texts({row["row"] for row in rows})
    except (FinetuneError, OSError) as error:
        return str(error).partition("\n")[0]
    for row in rows:
        row["text"] = texts.get(row["row"])
    return ""


def bands(figures: Sequence[Figure | None]) -> tuple[np.ndarray, np.ndarray]:
    """Low and high of each interval, NaN where there is none."""
    ends = [figure.interval if figure and figure.interval else (np.nan, np.nan) for figure in figures]
    low, high = np.array(ends).reshape(-1, 2).T
    return low, high
