"""`evaluate` and `compare`: how good models are, and which is better."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import OVERRIDE, PATH, REFS, where_it_is_or_files
from finetune.recipe.schema import HELD_OUT
from finetune.recipe.schema.metrics import BY_NAME

if TYPE_CHECKING:
    from finetune.compare.evaluate import Evaluated


class HowToEvaluate(TypedDict):
    recipe: Path | None
    overrides: tuple[str, ...]
    files: list[str]
    is_seen_allowed: bool
    is_again: bool
    rows: tuple[str, ...]
    max_new_tokens: int


@click.command()
@click.argument("refs", nargs=-1, metavar="REF...")
@click.option(
    "--rows",
    multiple=True,
    metavar="NAME",
    help="Evaluate only this set: held-out, or a name of evaluate.sets. You may give several. Needed for evaluate.test_set.",
)
@click.option("--recipe", type=PATH, help="Evaluate on the rows of this recipe, not of the refs' own runs.")
@OVERRIDE
@click.option("--every-checkpoint", "is_every", is_flag=True, help="Evaluate all checkpoints of a RUN without a step.")
@click.option("--watch", "watched", type=PATH, metavar="RUN", help="Evaluate each commit of this run as it appears.")
@click.option(
    "--lm-eval", "tasks", multiple=True, metavar="TASK", help="Evaluate a task of lm-eval: a name, or a YAML file."
)
@click.option(
    "--metric",
    "names",
    multiple=True,
    type=click.Choice([*BY_NAME]),
    help="Also measure this of the model's own answers. You may give several.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of the longest answer, where the recipe does not say it.",
)
@click.option("--again", "is_again", is_flag=True, help="Also compute what is stored already.")
@click.option(
    "--seen", "is_seen_allowed", is_flag=True, help="Also evaluate rows that were trained on, and show how many."
)
@answers
@where_it_is_or_files
def evaluate(
    refs: tuple[str, ...],
    is_every: bool,
    watched: Path | None,
    tasks: tuple[str, ...],
    names: tuple[str, ...],
    **how: Unpack[HowToEvaluate],
) -> Answer:
    """Evaluate models on held-out rows, evaluation sets, or files."""
    if how["overrides"] and not how["recipe"]:
        raise click.UsageError("--set goes with --recipe: a run's own rows are those of its plan")
    if bool(refs) == bool(watched):
        raise click.UsageError("give REF..., or --watch RUN")
    if tasks and (watched or how["recipe"] or how["files"] or how["rows"] or names):
        raise click.UsageError("--lm-eval has its own rows: give it REF... alone")
    with importing():
        from finetune.compare import evaluate as evaluation
        from finetune.compare import harness
        from finetune.compare.results import Asked

    asked = Asked(**how, metrics=[BY_NAME[name] for name in dict.fromkeys(names)])
    if watched:
        from finetune.compare.watch import watch

        say = partial(click.echo, err=True)
        made = watch(watched, asked, lambda results: say("\n".join(map(_line, results))), say)
    else:
        refs = (*evaluation.every_checkpoint(refs),) if is_every else refs
        made = harness.results(refs, tasks, how["is_again"]) if tasks else evaluation.results(refs, asked)
    results = evaluation.shown(made)
    return Answer({"results": results}, "\n".join(map(_line, results)))


def _line(result: "Evaluated") -> str:
    """An evaluated model, for a reader."""
    rows = "" if result["set"] == HELD_OUT else f" on {result['set']}"
    line = f"{result['ref']}{rows}: " + "  ".join(f"{name} {value:.6g}" for name, value in result["metrics"].items())
    if result["seen"]:
        line += f"  seen rows {'unknown' if result['seen_rows'] is None else result['seen_rows']}"
    line += "  stored" if result["is_stored"] else ""
    return line if result["is_comparable"] else f"{line}  other {'held-out ' if result['set'] == HELD_OUT else ''}rows"


class HowToCompare(TypedDict):
    metric: str
    baseline: str | None
    margin: float | None
    cluster: str | None
    changed: int


@click.command()
@REFS
@click.option("--metric", default="loss", show_default=True, help="The measure to compare by.")
@click.option("--baseline", metavar="REF", help="Compare each ref with this one. Default: the first.")
@click.option(
    "--margin",
    type=click.FloatRange(min=0, min_open=True),
    help="A difference that does not matter to you: within it, refs are equivalent.",
)
@click.option("--cluster", metavar="COLUMN", help="Rows with the same value here belong together, like one author's.")
@click.option("--rows", metavar="NAME", help="The evaluation set to compare on. Default: the held-out rows.")
@click.option("--recipe", type=PATH, help="Compare on the rows of this recipe, not of the refs' own runs.")
@OVERRIDE
@click.option("--every-checkpoint", "is_every", is_flag=True, help="Compare all checkpoints of a RUN without a step.")
@click.option("--seen", "is_seen_allowed", is_flag=True, help="Also compare on rows that were trained on, and say so.")
@click.option(
    "--changed", type=click.IntRange(min=0), default=3, show_default=True, help="Show the N rows that changed most."
)
@click.option("--csv", "form", flag_value="comma_separated", help="Print a line for each ref as CSV.")
@click.option("--markdown", "form", flag_value="markdown", help="Print a Markdown table.")
@answers
@where_it_is_or_files
def compare(
    refs: tuple[str, ...],
    rows: str | None,
    is_every: bool,
    form: str | None,
    recipe: Path | None,
    overrides: tuple[str, ...],
    is_seen_allowed: bool,
    files: list[str],
    **question: Unpack[HowToCompare],
) -> Answer:
    """Compare models on the same rows: which are better, and which the rows cannot tell apart."""
    if overrides and not recipe:
        raise click.UsageError("--set goes with --recipe: a run's own rows are those of its plan")
    from finetune.compare import table
    from finetune.compare.candidates import compared
    from finetune.compare.compare import Question
    from finetune.compare.evaluate import every_checkpoint
    from finetune.compare.results import Asked

    texts = [*every_checkpoint(refs)] if is_every else refs
    facts = compared(texts, Asked(recipe, overrides, files, is_seen_allowed), rows, Question(**question))
    return Answer(facts, getattr(table, form or "text")(facts))
