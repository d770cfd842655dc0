"""`track`: sends what the trackers of a run lack."""

from pathlib import Path

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.options import RUN


@click.command()
@RUN
@answers
def track(run: Path) -> Answer:
    """Send the figures of a run that its trackers lack."""
    from finetune.training.trackers import catching_up

    facts = catching_up.send(run)
    return Answer(facts, catching_up.listing(facts), is_good=not any(each["problem"] for each in facts["trackers"]))
