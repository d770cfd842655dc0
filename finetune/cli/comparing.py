"""`evaluate` and `generate`: how good models are, and what they answer."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import OVERRIDE, PATH, REFS, where_it_is, where_it_is_or_files
from finetune.recipe.schema import HELD_OUT

if TYPE_CHECKING:
    from finetune.compare.evaluate import Evaluated


class HowToEvaluate(TypedDict):
    recipe: Path | None
    overrides: tuple[str, ...]
    files: list[str]
    is_seen_allowed: bool
    is_again: bool


@click.command()
@click.argument("refs", nargs=-1, metavar="REF...")
@click.option("--recipe", type=PATH, help="Evaluate on the rows of this recipe, not of the refs' own runs.")
@OVERRIDE
@click.option("--every-checkpoint", "is_every", is_flag=True, help="Evaluate all checkpoints of a RUN without a step.")
@click.option("--watch", "watched", type=PATH, metavar="RUN", help="Evaluate each commit of this run as it appears.")
@click.option("--again", "is_again", is_flag=True, help="Also compute what is stored already.")
@click.option(
    "--seen", "is_seen_allowed", is_flag=True, help="Also evaluate rows that were trained on, and show how many."
)
@answers
@where_it_is_or_files
def evaluate(refs: tuple[str, ...], is_every: bool, watched: Path | None, **how: Unpack[HowToEvaluate]) -> Answer:
    """Evaluate models on held-out rows, evaluation sets, or files."""
    if how["overrides"] and not how["recipe"]:
        raise click.UsageError("--set goes with --recipe: a run's own rows are those of its plan")
    if bool(refs) == bool(watched):
        raise click.UsageError("give REF..., or --watch RUN")
    with importing():
        from finetune.compare import evaluate as evaluation
        from finetune.compare.results import Asked

    asked = Asked(**how)
    if watched:
        from finetune.compare.watch import watch

        say = partial(click.echo, err=True)
        made = watch(watched, asked, lambda results: say("\n".join(map(_line, results))), say)
    else:
        made = evaluation.results([*evaluation.every_checkpoint(refs)] if is_every else refs, asked)
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


class Sampling(TypedDict):
    max_new_tokens: int
    temperature: float
    seed: int


@click.command()
@REFS
@click.option("--prompt", "prompts", multiple=True, help="A prompt; you may give several.")
@click.option("--prompt-file", type=click.File(), help="A file with one prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="The longest answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option("--seed", default=0, show_default=True, help="Decides the samples if the temperature is not 0.")
@answers
@where_it_is
def generate(
    refs: tuple[str, ...], prompts: tuple[str, ...], prompt_file: TextIO | None, **sampling: Unpack[Sampling]
) -> Answer:
    """Let models answer your prompts."""
    asked = [*prompts, *([prompt_file.read().strip()] if prompt_file else [])]
    if not asked:
        raise click.UsageError("give --prompt TEXT or --prompt-file FILE")
    with importing():
        from finetune.compare.generate import generate as generate_answers

    results = generate_answers(refs, asked, **sampling)
    return Answer({"results": results}, "\n".join(f"--- {result['ref']}\n{result['text']}" for result in results))
