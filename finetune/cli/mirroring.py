"""`mirror`: sends what the mirror of a run lacks."""

from pathlib import Path

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.options import RUN


@click.command()
@RUN
@click.option("--to", metavar="ADDRESS", help="Another mirror than the recipe's, like s3://bucket/prefix.")
@answers
def mirror(run: Path, to: str | None) -> Answer:
    """Send the commits of a run that its mirror lacks."""
    from finetune.store.mirror import following

    facts = following.send(run, to)
    return Answer(facts, following.listing(facts), is_good=not facts["missing"])
