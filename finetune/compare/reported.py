"""The figures of a package on `evaluate.test_set`: stored ones, or else computed now and kept."""

import sys
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from finetune.compare.evaluate import results
from finetune.compare.measure import of_model
from finetune.compare.results import Asked, Result
from finetune.errors import BaseError, CheckpointError, DataError, PackageError
from finetune.package.card.reported import Reported
from finetune.plan.plan import Plan
from finetune.store import evaluated, evaluations
from finetune.store.checkpoints.refs import find, parse, run_of
from finetune.store.run.directory import RunDirectory, step_of


def reported(ref: str, mean: PreTrainedModel | None = None) -> Reported | None:
    """Of a ref of a run, or of a mean of weights in its place; None where the run has no test set.

    PackageError where the rows are gone, or are not those that were planned.
    """
    run = run_of(parse(ref))
    plan = RunDirectory(run).plan()[0] if run else None
    if run is None or plan is None or (name := plan.recipe.evaluate.test_set) is None:
        return None
    asked = Asked(rows=(name,), is_seen_allowed=True)
    try:
        own = results([ref], asked)[0] if mean is None else None
        figures = own.evaluation.about["metrics"] if own else of_model(cast(PreTrainedModel, mean), run, name)
    except DataError as error:
        hint = f"{error.hint}; or package it with the figures of the held-out rows: --held-out"
        raise PackageError(error.message, where=error.where, hint=hint) from None
    base = _of_base(run, asked)
    checkpoint = find(parse(ref))
    seen = next(each.seen for each in plan.sets if each.name == name)
    if own and checkpoint.manifest.kind == "average":  # its members may be of other runs
        seen = own.found.seen
    return Reported(
        name,
        base.evaluation.about["metrics"] if base else None,
        figures,
        _answers(base),
        _answers(own),
        _earlier(run, plan, name, checkpoint.step, own),
        seen,
    )


def _of_base(run: Path, asked: Asked) -> Result | None:
    try:
        (base,) = results([f"{run}@0"], asked)
    except (BaseError, CheckpointError) as error:  # a full fine-tune is packaged without its base
        print(f"the base is not evaluated on {asked.rows[0]}: {error.message}", file=sys.stderr, flush=True)
        return None
    return base


def _answers(result: Result | None) -> dict[str, float]:
    return dict(result.scores.about["metrics"]) if result and result.scores else {}


def _earlier(run: Path, plan: Plan, name: str, step: int, own: Result | None) -> int:
    """How many other checkpoints of the run were evaluated on the rows before this one."""
    data = evaluated.rows(plan, next(each.contents for each in plan.sets if each.name == name))
    until = own.evaluation.about["created"] if own else None
    steps = {at for folder in RunDirectory(run).evaluations.glob("*") if (at := step_of(folder.name))} - {step}
    return sum(
        any(
            about["data"] == data and (until is None or about["created"] < until)
            for about in evaluations.read_abouts(evaluations.of_step(run, at))
        )
        for at in steps
    )
