"""`replay`, `bisect`, `diff` and `branch`: what a run did, when it went wrong, and how to go on from before."""

from pathlib import Path
from typing import TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import OVERRIDE, PATH, QUIET, REF, RUN, STEPS, UNTIL, where_it_is


@click.command()
@RUN
@click.option("--steps", required=True, type=STEPS, metavar="A..B", help="A step, or the first and the last one.")
@click.option("--inspect", "is_inspected", is_flag=True, help="Print rows, token losses and gradients of the steps.")
@click.option(
    "--materialize", "is_materialized", is_flag=True, help="Commit the state after each of the steps as a checkpoint."
)
@answers
@where_it_is
def replay(run: Path, steps: tuple[int, int], **choices: bool) -> Answer:
    """Run steps of a run again, and compare them with its record to the bit."""
    with importing():
        from finetune.debug import replay as replays

    facts = replays.replay(run, *steps, **choices)
    return Answer(facts, replays.listing(facts), is_good=facts["identical"])


class OtherPredicates(TypedDict):
    bad_evaluation: str | None
    bad_command: str | None
    good: int | None


@click.command()
@RUN
@click.option(
    "--bad",
    multiple=True,
    metavar="COMPARISON|STEP",
    help="A bad step is one with 'loss > 4', 'grad_norm/layers.3 > 1', or 'loss~20 > 4' for the mean of 20 steps. A number is a known bad step.",
)
@click.option("--bad-evaluation", metavar="COMPARISON", help="The same for held-out figures, like 'perplexity > 9'.")
@click.option(
    "--bad-command",
    metavar="COMMAND",
    help="Your command exits 0 if the checkpoint at {checkpoint} is good, 125 if it cannot tell; otherwise it is bad.",
)
@click.option("--good", type=click.IntRange(min=0), metavar="STEP", help="A known good step.")
@answers
@where_it_is
def bisect(run: Path, bad: tuple[str, ...], **others: Unpack[OtherPredicates]) -> Answer:
    """Find the step at which a run went wrong, and the rows to blame."""
    with importing():
        from finetune.debug import bisect as bisection

    steps, comparisons = ([each for each in bad if each.isdecimal() == is_step] for is_step in (True, False))
    if len(steps) > 1 or len(comparisons) > 1:
        raise click.UsageError("give --bad once with a comparison, and once with a step")
    known = int(steps[0]) if steps else None
    facts = bisection.bisect(run, comparisons[0] if comparisons else None, bad=known, **others)
    return Answer(facts, bisection.listing(facts), is_good=facts["first_bad_step"] is not None)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--picture", type=PATH, metavar="FILE", help="Write a heat map of the weights here, as PNG.")
@answers
@where_it_is
def diff(a: str, b: str, picture: Path | None) -> Answer:
    """Compare two checkpoints: recipes, figures, first step that differs, weights."""
    with importing():
        from finetune.debug import diff as comparison

    facts = comparison.diff(a, b, picture)
    return Answer(facts, comparison.listing(facts))


class OtherWays(TypedDict):
    """What is another way in a branch."""

    overrides: tuple[str, ...]
    skipped_rows: str | None
    schedule: str
    is_optimizer_reset: bool


@click.command()
@REF
@OVERRIDE
@click.option("--run", type=PATH, help="The new run's directory. Default: <run>-<step>.")
@click.option(
    "--skip-rows",
    "skipped_rows",
    metavar="FILE|IDS",
    help="Rows to skip: ids like 512,77, or a file with a line for each.",
)
@click.option(
    "--schedule",
    type=click.Choice(["continue", "restart"]),
    default="continue",
    show_default=True,
    help="Continue the curve of the learning rate, or restart it.",
)
@click.option("--reset-optimizer", "is_optimizer_reset", is_flag=True, help="Start without the optimizer's moments.")
@QUIET
@UNTIL
@click.option(
    "--no-train", is_flag=True, help="Only make the run; train it with `finetune train DIR/recipe.yaml --run DIR`."
)
@where_it_is
def branch(
    ref: str, run: Path | None, quiet: bool, until: int | None, no_train: bool, **choices: Unpack[OtherWays]
) -> None:
    """Start a new run from a step of another one, with other settings or without some rows."""
    with importing():
        from finetune.debug import branch as branches

    made = branches.branch(ref, run, branches.Choices(**choices), is_quiet=quiet, until=until, is_to_train=not no_train)
    if no_train:
        click.echo(made)
