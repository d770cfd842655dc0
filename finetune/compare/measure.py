"""Evaluates models, and keeps the result of each row beside what was evaluated."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from transformers import PreTrainedModel

from finetune.compare.results import Asked, Result, Weights, asked_of, keep, remember, set_names, wanted_of, weights_of
from finetune.data.heldout import lineage
from finetune.data.row_set import RowSet
from finetune.errors import DataError, FinetuneError
from finetune.model import base, losses
from finetune.plan.plan import Plan
from finetune.plan.split import Seen
from finetune.recipe.load import load
from finetune.recipe.schema import HELD_OUT, Base, Source
from finetune.store import evaluated as digests
from finetune.store import evaluations
from finetune.store.checkpoints.refs import Ref, find, parse, run_of
from finetune.store.evaluations import About, Evaluation
from finetune.store.run.directory import RunDirectory
from finetune.tasks import TASKS
from finetune.training.evaluation import evaluate as evaluate_objective
from finetune.training.evaluation import evaluated
from finetune.training.evaluation_sets import held_out_set, read_set, seen_by, with_sets
from finetune.training.fitting import as_trained, check_packing
from finetune.training.opened import open_model
from finetune.training.resolve import Resolved, resolve, resolve_own
from finetune.training.state import Objective
from finetune.training.strategy.start import start_accelerator
from finetune.training.trial import packing_of, unpacked


class Measurer:
    """Evaluates refs on the rows that are asked for. It reads the rows of a run once, for all its refs."""

    def __init__(self, asked: Asked, texts: Sequence[str]):
        self._asked = asked
        self._of_runs: dict[Path, Resolved] = {}
        loaded = load(asked.recipe, asked.overrides) if asked.recipe else None
        self._shared = with_sets(resolve(loaded, today=_day_of(texts))) if loaded else None

    def results(self, texts: Sequence[str]) -> list[Result]:
        """One for each ref and set of rows. DataError where a run that trained what a ref names, or may have, had some of the rows,
        unless that is allowed."""
        # All rows are read, and what is stored is found, before a model takes its time: every rank of several finds the same.
        work = [self._work(text) for text in texts]
        return [result for each in work for result in each()]

    def _work(self, text: str) -> Callable[[], list[Result]]:
        ref = parse(text)
        run = run_of(ref)
        own = RunDirectory(run).plan()[0] if run else None
        resolved = self._shared or self._rows_of_run(text)
        # the plan of the run itself: a resolved one has no digests of an older version's rows, or other defaults
        settings = digests.settings(resolved.plan, own)
        weights = weights_at(ref, run, own)
        found: list[tuple[RowSet, lineage.Found, Evaluation | None]] = []
        sets, stages = self._sets(text, resolved), lineage.stages(text)
        for rows in sets:
            seen = seen_by(rows, resolved, stages)
            if seen.seen and not self._asked.is_seen_allowed:
                _refuse_seen(text, seen.seen, rows)
            data = digests.rows(resolved.plan, rows.contents)
            key = (weights.folder, data, weights.digest, settings)
            found.append((rows, seen, None if self._asked.is_again else evaluations.find(*key)))

        if not self._asked.recipe:
            for file, (rows, seen, _) in zip(self._asked.files, found, strict=False):
                remember(text, resolved.plan, file, rows.contents, seen)

        def measured() -> list[Result]:
            missing = [rows for rows, _, known in found if known is None]
            made = iter(_evaluations(text, resolved, missing) if missing else ())
            results = []
            for rows, seen, known in found:
                evaluation = known or keep(weights, _about(next(made), text, weights, settings))
                result = Result(text, rows.name, evaluation, seen, is_stored=known is not None)
                results.append(self._with_scores(result, rows, resolved, weights))
            return results

        return measured

    def _with_scores(self, result: Result, rows: RowSet, resolved: Resolved, weights: Weights) -> Result:
        if not self._asked.functions and wanted_of(resolved.plan, rows.name, self._asked) is None:
            return result
        from finetune.compare.answered import with_scores  # here: few evaluations generate

        return with_scores(result, rows, resolved, weights, self._asked)

    def _sets(self, text: str, resolved: Resolved) -> list[RowSet]:
        files = self._asked.files
        if files:
            named = zip(set_names(files), files, strict=True)
            return [read_set(name, [Source(path=file)], resolved.encoding)[1] for name, file in named]
        if len(resolved.holdout) == 0:
            hint = "set data.holdout, or give rows with --recipe FILE or --data FILE"
            raise DataError("no rows are held out", where=text, hint=hint)
        names = asked_of(resolved.plan, self._asked, text)
        return [rows for rows in (held_out_set(resolved), *resolved.sets) if rows.name in names]

    def _rows_of_run(self, text: str) -> Resolved:
        run = run_of(parse(text))
        if run is None or run not in self._of_runs:
            resolved = rows_of_run(text)
            made = resolved if self._asked.files or run is None else _with_own_sets(resolved, run, self._asked)
            return self._of_runs.setdefault(run or Path(text), made)
        return self._of_runs[run]


def _with_own_sets(resolved: Resolved, run: Path, asked: Asked) -> Resolved:
    """With the evaluation sets of a run that are asked for, as its plan has them. One that is gone, or has other rows, is skipped with a
    line; DataError where it was named."""
    sets, names = [], asked_of(resolved.plan, asked, str(run))
    for pinned in (each for each in resolved.plan.sets if each.name in names):
        try:
            rows = read_set(
                pinned.name, resolved.plan.recipe.evaluate.sets[pinned.name].rows, resolved.encoding, pinned.sources
            )[1]
            why = None if rows.contents == pinned.contents else "it has other rows than when it was planned"
        except DataError as error:
            why = f"{error.where}: {error.message}"
        if why and asked.rows:
            hint = "restore its file, or say with --data OLD=NEW where it is"
            raise DataError(f"evaluation set {pinned.name}: {why}", where=str(run), hint=hint)
        if why:
            print(f"evaluation set {pinned.name} of {run} is skipped: {why}", file=sys.stderr, flush=True)
        else:
            sets.append(rows)
    return replace(resolved, sets=tuple(sets))


def of_model(model: PreTrainedModel, run: Path, rows: str = HELD_OUT) -> dict[str, float]:
    """Figures of a live model on a set of rows of a run, one row in a sequence; empty where none are held out. It stays on the CPU."""
    resolved = rows_of_run(str(run))
    if len(resolved.holdout) == 0:
        return {}
    if rows != HELD_OUT:
        (named,) = _with_own_sets(resolved, run, Asked(rows=(rows,))).sets
        resolved = replace(resolved, holdout=named.examples)
    plan = resolved.plan
    # Our attention is not in this model, so packed rows are not told apart.
    arranged = plan.arrangement
    if arranged == "packed":
        arranged = unpacked(resolved.base_directory, plan.recipe.task.max_length)
    resolved = replace(resolved, plan=plan.model_copy(update={"arranged": arranged}))
    accelerator = start_accelerator(plan.recipe.train)
    figures = evaluate_objective(resolved, accelerator, _objective(model, resolved, accelerator)) or {}
    model.cpu()
    return figures


def rows_of_run(text: str) -> Resolved:
    """The rows of the run of a ref, encoded as it trained on them."""
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


def _day_of(texts: Sequence[str]) -> date | None:
    """The day in the plan of the first ref that has one: a template that prints it would give other figures every day."""
    runs = filter(None, map(run_of, map(parse, texts)))
    days = (RunDirectory(run).plan()[0].date for run in runs)
    return next((date.fromisoformat(day) for day in days if day), None)


def _refuse_seen(text: str, seen: Sequence[Seen], rows: RowSet) -> None:
    message = "; ".join(item.told(len(rows.says)) for item in seen)
    hint = "give rows that none of them had with --recipe FILE, or allow these with --seen"
    raise DataError(message, where=text, hint=hint)


def _whole(ref: Ref) -> Path | None:
    """A checkpoint that has all weights, with config and tokenizer beside them: its base need not be there."""
    path = find(ref).path if ref.kind in ("run", "checkpoint") else None
    if path is None or (path / "adapter_config.json").exists():
        return None
    return path if (path / "config.json").is_file() and base.has_tokenizer(path) else None


def weights_at(ref: Ref, run: Path | None, own: Plan | None) -> Weights:
    if run and own:
        return weights_of(ref, run, own)[1]
    if ref.kind == "checkpoint":
        digest = digests.weights(find(ref).manifest.files, "")
    else:
        base.refuse_foreign(ref.text)
        named = Base(checkpoint=ref.text)
        digest = digests.base(named, base.pin(named))
    return Weights(digest, evaluations.of_model(digest))


def _evaluations(text: str, resolved: Resolved, sets: Sequence[RowSet]) -> list[Evaluation]:
    """The model of a ref, opened and evaluated on sets of rows."""
    recipe = resolved.plan.recipe
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
    objective = _objective(model, resolved, accelerator)
    made = [evaluated(resolved, accelerator, objective, rows) for rows in sets]
    return [each for each in made if each]


def _objective(model: PreTrainedModel, resolved: Resolved, accelerator: Accelerator) -> Objective:
    token_losses, reason = losses.fitting(model)
    if resolved.plan.gpu_sums and not reason:
        token_losses = losses.in_large_chunks
    objective = Objective(model, TASKS[resolved.plan.recipe.task.name].loss, token_losses)
    return cast(Objective, accelerator.prepare_model(objective, evaluation_mode=True))


def _about(made: Evaluation, text: str, weights: Weights, settings: dict[str, str]) -> Evaluation:
    about = {**made.about, "ref": text, "model": weights.digest, "settings": settings}
    return replace(made, about=cast(About, about))
