"""`curves` and `report`: how trainings went, in a terminal and as a page."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import PATH, RunOrMirror, where_it_is
from finetune.store.strict_json import to_json

if TYPE_CHECKING:
    from finetune.compare.curves import Choice, Screen
    from finetune.compare.report.payload import Report
    from finetune.compare.series import Axis, Series

RUNS = click.argument("runs", nargs=-1, required=True, type=RunOrMirror(), metavar="RUN...")
NARROW, WIDE = 24, 1000
WHOLE_SCREEN = "\x1b[H\x1b[J"


@click.command()
@RUNS
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help="Draw this figure, like grad_norm or held_out_loss."
)
@click.option(
    "--x",
    "axis",
    type=click.Choice(["steps", "tokens", "hours"]),
    default="steps",
    show_default=True,
    help="Draw over steps, tokens, or hours in steps.",
)
@click.option(
    "--smooth",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Draw means of this many steps; 1 draws each step. Default: 1 in 50, of runs with more steps than columns.",
)
@click.option("--width", type=click.IntRange(NARROW, WIDE), metavar="COLUMNS", help="Default: that of the terminal.")
@click.option("--ascii", "is_ascii", is_flag=True, help="Draw with ASCII signs alone.")
@click.option("--follow", is_flag=True, help="Draw again until all of these runs are finished. Ctrl-C ends it.")
@click.option(
    "--refresh",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long --follow waits in between.",
)
def curves(
    runs: tuple[Path, ...], width: int | None, is_ascii: bool, follow: bool, refresh: float, **choice: object
) -> None:
    """Draw the figures of runs in the terminal, also while they train."""
    from finetune.compare.curves import Choice, open_series

    if follow and not sys.stdout.isatty():
        raise click.UsageError("--follow draws over a terminal; without one, run `curves` again instead")
    chosen = Choice(
        cast("tuple[str, ...]", choice["metrics"]), cast("Axis", choice["axis"]), cast("int | None", choice["smooth"])
    )
    series = open_series(runs)
    _draw(series, chosen, _screen(width, is_ascii, follow))
    while follow and not all(each.is_finished for each in series):
        time.sleep(refresh)
        news = [each.update() for each in series]
        if any(news):
            _draw(series, chosen, _screen(width, is_ascii, follow))


@click.command()
@RUNS
@click.option("--output", type=PATH, metavar="FILE", help="The page. Default: report.html.")
@click.option(
    "--baseline", metavar="REF", help="Show differences to this ref. Default: the first run's first evaluation."
)
@click.option("--weights", "are_weights_read", is_flag=True, help="Also show how far the weights are from the base.")
@click.option("--pictures", type=PATH, metavar="FOLDER", help="Also write the main plots here, as PNG.")
@click.option("--serve", is_flag=True, help="Serve the page to this machine, and follow the runs, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The port of --serve. Default: a free one.")
@answers
@where_it_is
def report(
    runs: tuple[Path, ...],
    output: Path | None,
    baseline: str | None,
    are_weights_read: bool,
    pictures: Path | None,
    serve: bool,
    port: int,
) -> Answer:
    """Write the report of runs: one page that needs no network."""
    from finetune.compare.report.payload import Asked, Report

    if serve and (output or pictures):
        raise click.UsageError("--serve writes no files: give it without --output and --pictures")
    if are_weights_read:
        with importing():
            from finetune.compare.report.weights import weights

    asked = Asked(baseline, weights(runs) if are_weights_read else ())
    found = Report(runs, asked)
    if serve:
        _serve(found, port)
    from finetune.compare.report.write import write

    facts = write(found, output or Path("report.html"), pictures)
    return Answer(facts, "\n".join(f"wrote {path}" for path in (facts["path"], *facts["pictures"])))


def _serve(found: "Report", port: int) -> NoReturn:
    """Until a signal raises its exception."""
    from finetune.compare.report.serve import server

    with server(found, port) as serving:
        facts = {"path": serving.url, "pictures": []}
        click.echo(to_json(facts) if "--json" in sys.argv else serving.url)
        click.echo("follows these runs until Ctrl-C", err=True)
        serving.serve_forever()
    raise AssertionError("it serves until an exception")


def _draw(series: "Sequence[Series]", choice: "Choice", screen: "Screen") -> None:
    from finetune.compare.curves import curves as drawn

    click.echo((WHOLE_SCREEN if screen.rows else "") + drawn(series, choice, screen))


def _screen(width: int | None, is_ascii: bool, follow: bool) -> "Screen":
    """What stdout can show now: a terminal may change its size."""
    from finetune.compare.curves import Screen

    is_terminal = sys.stdout.isatty()
    size = shutil.get_terminal_size((100, 30))
    try:
        "⣿┤●".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        is_ascii = True
    return Screen(
        columns=max(NARROW, min(width or size.columns, WIDE)),
        rows=size.lines if follow else None,
        is_ascii=is_ascii,
        is_colored=is_terminal and "NO_COLOR" not in os.environ,
    )
