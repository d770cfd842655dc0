"""The results of evaluations that are stored already, found by plans and manifests alone: no model, and no torch."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from finetune.compare.scores import Function, definition
from finetune.data.heldout import lineage
from finetune.data.heldout.lineage import Found
from finetune.data.sources.open import open_source
from finetune.errors import DataError, FinetuneError, RunError
from finetune.plan.plan import Plan
from finetune.plan.split import Seen
from finetune.recipe.schema import HELD_OUT, Source
from finetune.recipe.schema.metrics import Metric
from finetune.store import cache, evaluated, evaluations
from finetune.store.checkpoints.refs import Ref, find, parse, run_of
from finetune.store.evaluations import Evaluation
from finetune.store.rank import is_first
from finetune.store.run.directory import RunDirectory


@dataclass(frozen=True)
class Asked:
    """What to evaluate on: the rows of each ref's own run, unless it says more."""

    recipe: Path | None = None
    """Its rows, not those of the refs' runs."""
    overrides: Sequence[str] = ()
    files: Sequence[str] = ()
    """Files whose rows are evaluated, not the held-out ones."""
    is_seen_allowed: bool = False
    is_again: bool = False
    """Whether nothing that is stored is taken."""
    functions: Sequence[Function] = ()
    """Metrics of the user's own, of the model's answers to every set. Nothing stands for what they do, so they are called every time."""
    max_new_tokens: int = 128
    """Of answers to sets for which the recipe does not say it."""
    metrics: Sequence[Metric] = ()
    """Of answers to every set, beside those that the recipe names for it."""
    rows: Sequence[str] = ()
    """Names of sets of a run or recipe, where not all are asked for. `evaluate.test_set` is evaluated only if it is named."""

    def __post_init__(self) -> None:
        if self.rows and self.files:
            message = f"`{self.rows[0]}` names a set of a recipe, and the rows are those of files"
            raise FinetuneError(message, hint="give --rows or --data FILE, not both")


@dataclass(frozen=True)
class Result:
    """The evaluation of a ref on one set of rows."""

    ref: str
    rows: str
    """The name of the set, as it was asked for."""
    evaluation: Evaluation
    found: Found
    """Its rows that a run behind the ref trained on."""
    is_stored: bool
    scores: Evaluation | None = None
    """The evaluation of the model's own answers to the same rows, where metrics of them are asked for."""


class Weights(NamedTuple):
    """What stands for the weights that a ref names, and where their evaluations are kept."""

    digest: str
    folder: Path


class _Remembered(TypedDict):
    """What the rows of a file are to a plan."""

    contents: str
    seen: list[dict[str, object]]
    rows: int | None
    """How many of them were seen."""


class _UnknownError(Exception):
    """Nothing is kept for these facts."""


def stored(text: str, asked: Asked) -> list[Result] | None:
    """All results that are asked for of a ref; None where one of them has to be computed first."""
    if asked.is_again or asked.recipe or asked.functions:
        return None
    ref = parse(text)
    run = run_of(ref)
    if run is None or not RunDirectory(run).is_run:
        return None
    plan, _ = RunDirectory(run).plan()
    step, weights = weights_of(ref, run, plan)
    kept = _files(text, plan, asked.files) if asked.files else _own(plan, run, step, asked_of(plan, asked, text))
    if kept is None:
        return None
    results = []
    for name, contents, found in kept:
        if found.seen and not asked.is_seen_allowed:  # its error comes with what it takes to say it
            return None
        settings, data = evaluated.settings(plan, plan), evaluated.rows(plan, contents)
        evaluation = evaluations.find(weights.folder, data, weights.digest, settings)
        if evaluation is None:
            return None
        wanted = wanted_of(plan, name, asked)
        scores = evaluations.find(weights.folder, data, weights.digest, settings | wanted.settings) if wanted else None
        if wanted and scores is None:
            return None
        results.append(Result(text, name, evaluation, found, is_stored=True, scores=scores))
    return results


def weights_of(ref: Ref, run: Path, plan: Plan) -> tuple[int, Weights]:
    """Step and weights of a ref of a run."""
    base = evaluated.base(plan.recipe.base, plan.base)
    if ref.kind == "base":
        return 0, Weights(base, evaluations.of_step(run, 0))
    checkpoint = find(ref)
    digest = evaluated.weights(checkpoint.manifest.files, base)
    return checkpoint.step, Weights(digest, evaluations.of_step(run, checkpoint.step))


def keep(weights: Weights, made: Evaluation) -> Evaluation:
    """Writes an evaluation to its place. Where that cannot be written, a line says so: its figures are right all the same."""
    if is_first(os.environ):
        try:
            evaluations.write(weights.folder, made)
        except RunError as error:
            print(f"the results of {made.about['ref']} are not kept: {error.message}", file=sys.stderr, flush=True)
    return made


class Wanted(NamedTuple):
    """Metrics of answers to a set of rows."""

    metrics: Sequence[Metric]
    max_new_tokens: int

    @property
    def settings(self) -> dict[str, str]:
        """What they add to the settings of an evaluation."""
        return {"max_new_tokens": str(self.max_new_tokens), "metrics": definition(self.metrics)}


def wanted_of(plan: Plan, rows: str, asked: Asked) -> Wanted | None:
    """Those that the recipe of a plan names for one of its sets, and those that are asked for."""
    given = None if asked.files else plan.recipe.evaluate.sets.get(rows)
    own = given.metrics if given else []
    metrics = [*own, *(each for each in asked.metrics if each.name not in {one.name for one in own})]
    if not metrics:
        return None
    return Wanted(metrics, given.max_new_tokens if own and given else asked.max_new_tokens)


def asked_of(plan: Plan, asked: Asked, text: str) -> list[str]:
    """The names of a plan's sets of rows that are evaluated, in their order. DataError where a named one is not among them."""
    known = [HELD_OUT, *(each.name for each in plan.sets)]
    if unknown := [name for name in asked.rows if name not in known]:
        hint = f"the sets of rows are: {', '.join(known)}"
        raise DataError(f"has no rows named `{unknown[0]}`", where=text, hint=hint)
    test_set = plan.recipe.evaluate.test_set
    return [name for name in known if (name in asked.rows if asked.rows else name != test_set)]


def set_names(files: Sequence[str]) -> list[str]:
    """Of files: their names, or their paths where two have one name."""
    names = [Path(file).name for file in files]
    return names if len(set(names)) == len(names) else [*files]


_Kept = tuple[str, str, Found]
"""Name and contents of a set, and what is known of its rows."""


def _own(plan: Plan, run: Path, step: int, names: Sequence[str]) -> list[_Kept] | None:
    """Sets of rows of a run, as its plan has them; None where the plan does not say enough."""
    if not plan.held_out:  # nothing is held out, or an older version drew the rows
        return None
    known: list[_Kept] = []
    sets = [(each.name, each.contents, each.seen) for each in plan.sets]
    for name, contents, seen in ((HELD_OUT, plan.held_out, plan.seen), *sets):
        if name not in names:
            continue
        found = _at(seen, run, step)
        if found is None:
            return None
        known.append((name, contents, found))
    return known


def _at(seen: Sequence[Seen], run: Path, step: int) -> Found | None:
    """What a plan found, for one of its steps; None where it has to be found out again."""
    of_step = [
        item.model_copy(update={"by": f"{run.absolute().name}@{step}"}) if item.by == lineage.THIS_RUN else item
        for item in seen
        if step or item.by != lineage.THIS_RUN
    ]
    # of several runs, the plan does not say how many rows are the same
    if len(of_step) > 1 or any(item.rows is None for item in of_step):
        return None
    return Found(tuple(of_step), sum(item.rows or 0 for item in of_step))


def _files(text: str, plan: Plan, files: Sequence[str]) -> list[_Kept] | None:
    def unknown() -> _Remembered:
        raise _UnknownError

    known: list[_Kept] = []
    for name, file in zip(set_names(files), files, strict=True):
        try:
            kept = cache.found("row-sets", facts_of(text, plan, file), unknown)
        except _UnknownError:
            return None
        seen = tuple(map(Seen.model_validate, kept["seen"]))
        known.append((name, kept["contents"], Found(seen, kept["rows"])))
    return known


def remember(text: str, plan: Plan, file: str, contents: str, found: Found) -> None:
    """Keeps what a file's rows are, for the next time that the same content is asked for."""
    seen = [item.model_dump() for item in found.seen]
    cache.found(
        "row-sets", facts_of(text, plan, file), lambda: {"contents": contents, "seen": seen, "rows": found.rows}
    )


def facts_of(text: str, plan: Plan, file: str) -> dict[str, object]:
    """What decides which rows a file has for a plan, and which of them the runs behind a ref trained on."""
    task, source = plan.recipe.task, Source(path=file)
    skips_bad = plan.recipe.data.on_bad_row == "skip"
    rows = open_source(source, None, plan.row_rules, task.row_form, skips_bad)
    return {
        "file": [file, rows.fingerprint],
        "task": task.model_dump(mode="json"),
        "read": [plan.row_rules, skips_bad, plan.recipe.data.allow, plan.encoding],
        "stages": [stage.model_dump(mode="json") for stage in lineage.stages(text)],
    }
