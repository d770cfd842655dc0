"""`encode`: rows to tokens, ahead of a training."""

from pathlib import Path

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import OVERRIDE, RECIPE


class Shard(click.ParamType[tuple[int, int]]):
    """`3/16`: the third of 16."""

    name = "shard"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        number, _, of = value.partition("/")
        if not (number.isdecimal() and of.isdecimal()) or not 1 <= int(number) <= int(of):
            self.fail(f"`{value}` is not like 3/16, the third of 16 tasks")
        return int(number), int(of)


@click.command()
@RECIPE
@OVERRIDE
@click.option("--shard", type=Shard(), default="1/1", metavar="I/N", help="Make the shards of task I of N only.")
@answers
def encode(recipe: Path, overrides: tuple[str, ...], shard: tuple[int, int]) -> Answer:
    """Encode the rows of a recipe into the cache, ahead of a training; also as one of several tasks."""
    from finetune.recipe.load import load

    loaded = load(recipe, overrides)
    with importing():
        from finetune.data.encode import Part
        from finetune.training import ahead

    report = ahead.encode_ahead(loaded, Part(*shard))
    return Answer(report, ahead.listing(report, Part(*shard)))
