"""Held-out figures of anything a ref can name, on the rows that a run or a recipe holds out."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TypedDict, cast

from accelerate import Accelerator
from transformers import PreTrainedModel

from finetune.data.heldout import lineage
from finetune.errors import DataError, FinetuneError
from finetune.model import base, losses, rotary
from finetune.plan.facts import Metrics
from finetune.plan.plan import are_same_rows
from finetune.plan.split import Seen
from finetune.recipe.load import load
from finetune.store.checkpoints.refs import Ref, find, parse
from finetune.store.run.directory import RunDirectory
from finetune.tasks import TASKS
from finetune.training.build import as_trained, check_packing, start_accelerator
from finetune.training.evaluation import evaluate as evaluate_objective
from finetune.training.opened import open_model, run_of
from finetune.training.resolve import Resolved, resolve, resolve_own
from finetune.training.state import Objective
from finetune.training.trial import packing_of


class SeenBy(TypedDict):
    """`Seen`, as JSON."""

    by: str
    rows: int | None
    why: str


class Evaluated(TypedDict):
    """A result of `evaluate --json`."""

    ref: str
    metrics: Metrics
    seen_rows: int | None
    """Held-out rows that whatever trained what the ref names had; None where that cannot be found out."""
    seen: list[SeenBy]
    is_comparable: bool


def evaluate(
    texts: Sequence[str], recipe: Path | None, overrides: Sequence[str], is_seen_allowed: bool = False
) -> list[Evaluated]:
    """One {ref, metrics, seen_rows, seen, is_comparable} a ref. Rows come from `recipe`, or else from each ref's own run; figures are
    comparable where these are the rows of the first ref.

    DataError where a run that trained what a ref names, or may have, had some of the rows, unless that is allowed: then `seen_rows` says
    how many of them it had; None where that cannot be found out.
    """
    shared = resolve(load(recipe, overrides), today=_day_of(texts)) if recipe else None
    rows = {text: shared or _rows_of_run(text) for text in texts}
    seen = {text: rows[text].held_out.seen_by(lineage.stages(text)) for text in texts}
    for text in texts if not is_seen_allowed else ():  # before any of them takes its time
        _refuse_seen(text, seen[text].seen, rows[text])
    return [
        {
            "ref": text,
            "metrics": _metrics(text, rows[text]),
            "seen_rows": seen[text].rows,
            "seen": [cast(SeenBy, item.model_dump()) for item in seen[text].seen],
            "is_comparable": are_same_rows(rows[text].plan, rows[texts[0]].plan),
        }
        for text in texts
    ]


def _day_of(texts: Sequence[str]) -> date | None:
    """The day in the plan of the first ref that has one: a template that prints it would give other figures every day."""
    runs = filter(None, map(run_of, map(parse, texts)))
    days = (RunDirectory(run).plan()[0].date for run in runs)
    return next((date.fromisoformat(day) for day in days if day), None)


def _refuse_seen(text: str, seen: Sequence[Seen], resolved: Resolved) -> None:
    if seen:
        message = "; ".join(item.told(len(resolved.held_out.says)) for item in seen)
        hint = "give rows that none of them had with --recipe FILE, or allow these with --seen"
        raise DataError(message, where=text, hint=hint)


def of_model(model: PreTrainedModel, run: Path) -> dict[str, float]:
    """Held-out figures of a live model on the rows of a run, one row in a sequence; empty where none are held out. It stays on the CPU."""
    resolved = _rows_of_run(str(run))
    if len(resolved.holdout) == 0:
        return {}
    plan = resolved.plan
    # Padding would give a row the rotary frequencies of the longest beside it.
    apart = "alone" if rotary.is_by_length(model.config) else "padded"
    arranged = apart if plan.arrangement == "packed" else plan.arrangement
    resolved = replace(resolved, plan=plan.model_copy(update={"arranged": arranged}))
    figures = _figures(model, resolved, start_accelerator(plan.recipe.train))
    model.cpu()
    return figures


def _rows_of_run(text: str) -> Resolved:
    ref = parse(text)
    run = run_of(ref)
    if run is None:
        raise FinetuneError(
            "is not part of a run, so it has no held-out rows",
            where=text,
            hint="give them with --recipe FILE",
        )
    plan, facts = RunDirectory(run).plan()
    resolved = resolve_own(plan, RunDirectory(run).plan_file, stand_in=_whole(ref))
    return replace(resolved, micro_batch_tokens=facts["micro_batch_tokens"])


def _whole(ref: Ref) -> Path | None:
    """A checkpoint that has all weights, with config and tokenizer beside them: its base need not be there."""
    path = find(ref).path if ref.kind in ("run", "checkpoint") else None
    if path is None or (path / "adapter_config.json").exists():
        return None
    return path if (path / "config.json").is_file() and base.has_tokenizer(path) else None


def _metrics(text: str, resolved: Resolved) -> dict[str, float]:
    recipe = resolved.plan.recipe
    if len(resolved.holdout) == 0:
        raise DataError("no rows are held out", where=text, hint="set data.holdout, or give rows with --recipe FILE")
    accelerator = start_accelerator(recipe.train)
    is_packed = resolved.plan.arrangement == "packed"
    packing = packing_of(resolved.base_directory, recipe.task.max_length) if is_packed else None
    opened = open_model(text, packing and packing.attention, device=accelerator.device)
    model, own = opened.model, base.load_tokenizer(opened.directory)
    if own.backend_tokenizer.to_str() != resolved.tokenizer.backend_tokenizer.to_str():
        raise FinetuneError(
            "has another tokenizer than the rows were encoded with",
            where=text,
            hint="evaluate it with its own recipe",
        )
    if packing:
        packing.apply(model)
        with as_trained(recipe.train, accelerator.device):
            check_packing(model, recipe.task.max_length, packing)
    return _figures(model, resolved, accelerator)


def _figures(model: PreTrainedModel, resolved: Resolved, accelerator: Accelerator) -> dict[str, float]:
    recipe = resolved.plan.recipe
    token_losses, _ = losses.fitting(model)
    objective = accelerator.prepare_model(
        Objective(model, TASKS[recipe.task.name].loss, token_losses), evaluation_mode=True
    )
    return evaluate_objective(resolved, accelerator, objective) or {}
