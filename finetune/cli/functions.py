"""The verbs of the command line as functions of the package, with typed arguments and results; errors are FinetuneErrors."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.options import default_run
from finetune.recipe.load import load
from finetune.store import places

if TYPE_CHECKING:
    from finetune.compare.evaluate import Evaluated
    from finetune.compare.scores import Function
    from finetune.compare.shown import Comparison
    from finetune.package.export import Packaged
    from finetune.training.preview import PlanFacts


@places.anew()
def plan(recipe: Path | str, overrides: Sequence[str] = (), *, run: Path | str | None = None) -> "PlanFacts":
    """What a recipe will do: pins, rows, tokens, steps, memory, disk. Trains nothing. `overrides` are like `train.seed=1`."""
    from finetune.package.preflight import refuse_unpackageable
    from finetune.training.preview import preview

    found = preview(load(recipe, overrides), Path(run or default_run(Path(recipe))), refuse_unpackageable)
    found.refuse_unready()
    return found.facts


@places.anew()
def train(
    recipe: Path | str,
    run: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    until: int | None = None,
    is_quiet: bool = False,
) -> Path:
    """Starts the run of a recipe, or resumes it, in this process. Its directory, once it is finished or step `until` is committed."""
    from finetune.package.preflight import refuse_unpackageable
    from finetune.training.run import train as train_run

    path = Path(run or default_run(Path(recipe)))
    train_run(load(recipe, overrides), path, is_quiet=is_quiet, until=until, ask=refuse_unpackageable)
    return path


@places.anew()
def evaluate(
    refs: Sequence[str] | str,
    *,
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    files: Sequence[Path | str] = (),
    metrics: Sequence["Function"] = (),
    max_new_tokens: int = 128,
    is_seen_allowed: bool = False,
    is_again: bool = False,
    rows: Sequence[str] = (),
) -> "list[Evaluated]":
    """One result for each ref and set of rows: those of each ref's run, of a recipe, or of files. What is stored is not computed again.
    `rows` names sets; without it, all but `evaluate.test_set` are evaluated.

    Each of `metrics` gets a row with the model's answer, as `{row, prompt, answer, expected, loss, tokens}`, and returns a number. Their
    mean is the figure, under the function's name; more is better, unless the function has the attribute `better = "lower"`.
    """
    from finetune.compare.evaluate import results, shown
    from finetune.compare.results import Asked

    named = [str(file) for file in files]
    asked = Asked(
        Path(recipe) if recipe else None,
        overrides,
        named,
        is_seen_allowed,
        is_again,
        functions=metrics,
        max_new_tokens=max_new_tokens,
        rows=rows,
    )
    return shown(results([refs] if isinstance(refs, str) else refs, asked))


@places.anew()
def compare(
    refs: Sequence[str],
    *,
    metric: str = "loss",
    baseline: str | None = None,
    margin: float | None = None,
    cluster: str | None = None,
    rows: str | None = None,
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    files: Sequence[Path | str] = (),
    is_seen_allowed: bool = False,
) -> "Comparison":
    """Which refs are better than the baseline, the first one, on the same rows, and which the rows cannot tell apart. `rows` names a set of
    rows, `cluster` a column whose equal values belong together, and `margin` a difference that does not matter."""
    from finetune.compare.candidates import compared
    from finetune.compare.compare import Question
    from finetune.compare.results import Asked

    asked = Asked(Path(recipe) if recipe else None, overrides, [str(file) for file in files], is_seen_allowed)
    return compared(refs, asked, rows, Question(metric, baseline, margin, cluster))


@places.anew()
def package(
    ref: str,
    directory: Path | str,
    *,
    key: Path | str | None = None,
    dtype: str | None = None,
    is_held_out: bool = False,
) -> "Packaged":
    """Writes a checkpoint as a model folder, proven equal to the trained model. `key` is a PEM file to sign it with. `is_held_out` puts
    figures of the held-out rows on the card, although the recipe has `evaluate.test_set`."""
    from finetune.compare.reported import reported
    from finetune.package.export import package as package_ref

    report = None if is_held_out else reported
    return package_ref(ref, Path(directory), Path(key) if key else None, dtype=dtype, report=report)
