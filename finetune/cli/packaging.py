"""`package` and `publish`: a checkpoint as a model that others can load, and where they find it."""

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import PATH, REF, where_it_is
from finetune.errors import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.package.card.reported import Reported


@click.command()
@REF
@click.argument("directory", type=PATH)
@click.option("--sign", "key", type=PATH, metavar="PEM", help="Sign it with this private key.")
@click.option(
    "--average",
    "steps",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="STEP",
    help="Package the mean of the weights of REF and of this step; you may give several.",
)
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp32"]), help="Type of the weights. Default: package.dtype of the recipe."
)
@click.option(
    "--held-out",
    "is_held_out",
    is_flag=True,
    help="Take the card's figures from the held-out rows, even if the recipe has evaluate.test_set.",
)
@answers
@where_it_is
def package(
    ref: str, directory: Path, key: Path | None, steps: tuple[int, ...], dtype: str | None, is_held_out: bool
) -> Answer:
    """Write a checkpoint as a model folder, proven equal to the trained model."""
    with importing():
        from finetune.compare.measure import of_model
        from finetune.package import export

    average, report = export.Average(steps, of_model) if steps else None, None if is_held_out else _report
    facts = export.package(ref, directory, key, average, dtype=dtype, report=report)
    lines = [f"{check['name']}: {check['message']}" for check in facts["checks"]]
    return Answer(facts, "\n".join([*lines, f"packaged {ref} as {directory}"]))


def _report(ref: str, mean: "PreTrainedModel | None") -> "Reported | None":
    from finetune.compare.reported import reported  # here: it imports torch, and a package is published without it

    return reported(ref, mean)


class Commit(TypedDict):
    branch: str
    tag: str | None
    is_dry_run: bool


@click.command()
@click.argument("source", metavar="DIR|REF")
@click.option("--to", "target", metavar="OWNER/NAME|folder:PATH", help="Default: publish.repo of the recipe of a REF.")
@click.option("--branch", default="main", show_default=True, help="The branch for the package.")
@click.option("--tag", help="A tag for the commit.")
@click.option("--public", "is_public", is_flag=True, help="Publish it to everybody. Default: private.")
@click.option("--replace", "is_replacing", is_flag=True, help="Overwrite people's changes; their additions stay.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only show what would happen.")
@click.option("--milestones", "has_milestones", is_flag=True, help="Publish the remaining milestones of a run.")
@click.option(
    "--follow", "is_following", is_flag=True, help="With --milestones: continue until stdin ends, as beside a training."
)
@answers
@where_it_is
def publish(
    source: str,
    target: str | None,
    is_public: bool,
    is_replacing: bool,
    has_milestones: bool,
    is_following: bool,
    **choices: Unpack[Commit],
) -> Answer:
    """Put a package on the Hub unchanged, in one commit, or not at all."""
    if has_milestones:
        from finetune.package.publish import queue

        caught_up = queue.follow(Path(source), target, is_following, is_public, is_replacing)
        return Answer(caught_up, f"{counted(len(caught_up['published']), 'milestone')} published")
    with importing():
        from finetune.package.publish import publish as publishing

    directory, target, is_private = publishing.prepared(source, target, is_public, _report)
    chosen = publishing.Choices(is_private=is_private, is_replacing=is_replacing, **choices)
    facts = publishing.publish(directory, target, chosen)
    return Answer(facts, publishing.listing(facts))
