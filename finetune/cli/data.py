"""`data show`, `data check` and `data convert`: what the rows of a recipe become, before any training."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import OVERRIDE, PATH, RECIPE
from finetune.errors import FinetuneError, counted

if TYPE_CHECKING:
    from finetune.recipe.load import LoadedRecipe


@click.group()
def data() -> None:
    """Look at the rows of a recipe: what is learnt, what is wrong with them."""


@data.command()
@RECIPE
@OVERRIDE
@click.option("--skip", multiple=True, metavar="CHECK", help="A check to skip; you may give several.")
@click.option(
    "--places", type=click.IntRange(min=0), default=5, show_default=True, help="Findings of each check to print."
)
@answers
def check(recipe: Path, overrides: tuple[str, ...], skip: tuple[str, ...], places: int) -> Answer:
    """Check every row: copies, cuts, damaged text, secrets, and more. Exit code 1 with problems."""
    loaded = _loaded(recipe, overrides)
    with importing():
        from finetune.data.checks import CHECKS
        from finetune.debug.rows import check as checking
        from finetune.debug.rows import report

    if unknown := [name for name in skip if name not in CHECKS]:
        raise click.UsageError(f"--skip {unknown[0]}: the checks are {', '.join(CHECKS)}")
    facts = checking.check(loaded, skip)
    return Answer(facts, report.listing(facts, places), is_good=facts["ok"])


@data.command()
@RECIPE
@OVERRIDE
@click.option("--rows", "count", type=click.IntRange(min=1), default=3, show_default=True, help="The first N rows.")
@click.option(
    "--row",
    "chosen",
    type=click.IntRange(min=0),
    multiple=True,
    help="A row by its number, from 0; you may give several.",
)
@click.option("--source", metavar="KEY|PLACE", help="A source, like data.holdout[0] or its file; rows count within it.")
@click.option(
    "--token", "numbers", type=click.IntRange(min=0), multiple=True, help="Say why this token is learnt or not, from 0."
)
@click.option("--html", type=PATH, metavar="FILE", help="Write a page with a reason for each token.")
@answers
def show(
    recipe: Path,
    overrides: tuple[str, ...],
    count: int,
    chosen: tuple[int, ...],
    source: str | None,
    numbers: tuple[int, ...],
    html: Path | None,
) -> Answer:
    """Show which tokens of rows are learnt, which are cut away, and why."""
    loaded = _loaded(recipe, overrides)
    with importing():
        from finetune.debug.rows import page, terminal
        from finetune.debug.rows import show as showing
        from finetune.store.durable import failures

    shown = showing.show(loaded, source, count, chosen)
    if html:
        with failures(html, FinetuneError):
            html.write_text(page.page(shown, f"Rows of {recipe}"), encoding="utf-8")
    is_good = all(example["refused"] is None for example in shown["examples"])
    written = str(html) if html else terminal.text(shown, numbers, sys.stdout.isatty())
    return Answer(shown, written, is_good=is_good)


@data.command()
@RECIPE
@click.argument("out", type=PATH)
@OVERRIDE
@click.option("--source", metavar="KEY|PLACE", help="Only this source, like data.holdout[0] or its file.")
@click.option("--force", "is_forced", is_flag=True, help="Replace the file OUT.")
@answers
def convert(recipe: Path, out: Path, overrides: tuple[str, ...], source: str | None, is_forced: bool) -> Answer:
    """Write the rows as messages: .jsonl, .jsonl.gz or .parquet."""
    loaded = _loaded(recipe, overrides)
    with importing():
        from finetune.debug.rows import convert as converting
        from finetune.plan.disk import readable

    facts = converting.convert(loaded, out, source, is_forced)
    said = f"{counted(facts['rows'], 'row')} in {facts['path']}, {readable(facts['bytes'])}"
    skipped = f"; {counted(facts['skipped'], 'bad row')} skipped (data.on_bad_row)" if facts["skipped"] else ""
    return Answer(facts, said + skipped)


def _loaded(recipe: Path, overrides: Sequence[str]) -> "LoadedRecipe":
    from finetune.recipe.load import load

    return load(recipe, overrides)
