"""`average`: one checkpoint of several, with the weights of a mean, of a moving average, or of a decay chosen afterwards."""

from pathlib import Path
from typing import TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import PATH, REFS, where_it_is

SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


class Numbers(click.ParamType[tuple[float, ...]]):
    """`1,2,1`."""

    name = "numbers"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(map(float, value.split(",")))
        except ValueError:
            self.fail(f"`{value}` is not a list of numbers like 1,2,1")


class Ways(TypedDict):
    """The options that decide what comes out."""

    weights: tuple[float, ...]
    ema: float | None
    last: int | None
    like: str | None
    window: int | None
    every: int
    is_stored: bool
    with_base: float | None
    is_kept_ema: bool
    rank: int | None
    is_merged: bool


@click.command()
@REFS
@click.option(
    "--weights", type=Numbers(), default=(), metavar="1,2,1", help="A weight for each REF. Default: equal ones."
)
@click.option("--ema", type=SHARE, metavar="DECAY", help="An exponential moving average over the REFs, in their order.")
@click.option("--last", type=click.IntRange(min=1), metavar="K", help="The K newest commits of the run up to REF.")
@click.option(
    "--like",
    type=click.Choice(["linear", "cosine", "1-sqrt"]),
    help="As if the learning rate had fallen so in the last steps up to REF.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --like or --search: N steps. Those not stored are made by replay.",
)
@click.option("--every", type=click.IntRange(min=1), default=1, metavar="N", help="Take every Nth step of the window.")
@click.option("--stored", "is_stored", is_flag=True, help="Take only the stored steps of the window.")
@click.option(
    "--with-base", type=SHARE, metavar="ALPHA", help="ALPHA of the average and the rest of the base (WiSE-FT)."
)
@click.option("--kept-ema", "is_kept_ema", is_flag=True, help="Take the moving average that the run kept (train.ema).")
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="N", help="Of LoRA adapters: the nearest adapter of this rank."
)
@click.option("--merged", "is_merged", is_flag=True, help="Of adapters: merge the average onto the base.")
@click.option("--output", type=PATH, metavar="DIR", help="The new checkpoint. Default: <run>/averages/<what it is>.")
@click.option("--no-evaluate", is_flag=True, help="Do not evaluate it on the held-out rows of its run.")
@click.option(
    "--search", "is_search", is_flag=True, help="Try the usual averages up to REF, and keep one that is better."
)
@click.option("--keep-all", "is_all_kept", is_flag=True, help="With --search: keep all averages.")
@answers
@where_it_is
def average(
    refs: tuple[str, ...],
    output: Path | None,
    no_evaluate: bool,
    is_search: bool,
    is_all_kept: bool,
    **ways: Unpack[Ways],
) -> Answer:
    """Average checkpoints into a new one."""
    if is_all_kept and not is_search:
        raise click.UsageError("--keep-all goes with --search")
    with importing():
        from finetune.compare import average as averages
        from finetune.compare.average_choice import Choices

    if is_search:
        from finetune.compare import searched
        from finetune.compare.average_search import search

        found = search(refs, Choices(**ways), output, not no_evaluate, is_all_kept)
        return Answer(found, searched.text(found))
    facts = averages.average(refs, Choices(**ways), output, not no_evaluate)
    return Answer(facts, averages.listing(facts))
