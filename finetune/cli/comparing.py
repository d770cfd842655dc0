"""`evaluate` and `generate`: how good models are, and what they answer."""

from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import OVERRIDE, PATH, REFS, where_it_is

if TYPE_CHECKING:
    from finetune.compare.evaluate import Evaluated


@click.command()
@REFS
@click.option("--recipe", type=PATH, help="Evaluate on the held-out rows of this recipe, not of the refs' own runs.")
@OVERRIDE
@click.option(
    "--seen", "is_seen_allowed", is_flag=True, help="Also evaluate rows that were trained on, and show how many."
)
@answers
@where_it_is
def evaluate(refs: tuple[str, ...], recipe: Path | None, overrides: tuple[str, ...], is_seen_allowed: bool) -> Answer:
    """Evaluate models on held-out rows."""
    if overrides and not recipe:
        raise click.UsageError("--set goes with --recipe: a run's own rows are those of its plan")
    with importing():
        from finetune.compare.evaluate import evaluate as evaluate_refs

    results = evaluate_refs(refs, recipe, overrides, is_seen_allowed)
    return Answer({"results": results}, "\n".join(map(_line, results)))


def _line(result: "Evaluated") -> str:
    """An evaluated model, for a reader."""
    line = f"{result['ref']}: " + "  ".join(f"{name} {value:.6g}" for name, value in result["metrics"].items())
    if result["seen"]:
        line += f"  seen rows {'unknown' if result['seen_rows'] is None else result['seen_rows']}"
    return line if result["is_comparable"] else f"{line}  other held-out rows"


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
