"""Options and arguments that several commands share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from finetune.recipe.addresses import is_place
from finetune.store import places

Command = Callable[..., Any]


class RunHere(click.ParamType[Path]):
    """A run directory on this disk: the command writes there, or needs all of it."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, context: click.Context | None) -> Path:
        if isinstance(value, str) and is_place(value):
            self.fail(f"`{value}` is a mirror; name a directory on this disk, where `finetune train` restores the run")
        return Path(value)


class RunOrMirror(click.ParamType[Path]):
    """A run directory, or the address of a mirror: then the one in the cache that stands for it."""

    name = "run"

    def convert(self, value: str | Path, param: click.Parameter | None, context: click.Context | None) -> Path:
        if isinstance(value, Path) or not is_place(value):
            return Path(value)
        from finetune.store.mirror import replica

        return replica.run_of(value.rstrip("/"))


PATH = click.Path(path_type=Path)
RECIPE = click.argument("recipe", type=PATH)
REF = click.argument("ref")
REFS = click.argument("refs", nargs=-1, required=True, metavar="REF...")
RUN = click.argument("run", type=RunHere())
RUN_TO_READ = click.argument("run", type=RunOrMirror(), metavar="RUN")
"""For commands that write nothing there."""
NEW_RUN = click.option("--run", type=RunHere(), help="The run directory. Default: runs/<recipe name>.")
OVERRIDE = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, like train.seed=1."
)
QUIET = click.option("--quiet", is_flag=True, help="Print commits and problems only.")
UNTIL = click.option("--until", type=click.IntRange(min=1), metavar="STEP", help="Stop after this step, committed.")


def default_run(recipe: Path) -> Path:
    return Path(os.environ.get("FINETUNE_RUNS", "runs")) / recipe.stem


def how_to_train(command: Command) -> Command:
    """The options of `train` beside what is trained; `launch` hands them on."""
    schedule = click.option(
        "--schedule",
        type=click.Choice(["continue", "restart"]),
        help="The learning rate of an extended run. Default: continue.",
    )
    take_over = click.option(
        "--take-over",
        is_flag=True,
        help="Take over a run on a file system without locks, if its holder's heartbeat has stopped (waits 30 seconds).",
    )
    return QUIET(UNTIL(schedule(take_over(command))))


def where_it_is(command: Command) -> Command:
    """The options of every command that opens a run: where its base and data are, if they were moved."""
    return _where_it_is(command, "OLD=NEW", "The new place of a data file or folder of the run.")


def where_it_is_or_files(command: Command) -> Command:
    """The same, where `--data` also names files with other rows than the run's: the command gets them as `files`."""
    about = (
        "A file with the rows to evaluate; several are several sets. OLD=NEW: the new place of a data file of the run."
    )
    return _where_it_is(command, "FILE|OLD=NEW", about)


def _where_it_is(command: Command, metavar: str, about: str) -> Command:
    @functools.wraps(command)
    def with_places(*arguments: object, bases: tuple[str, ...], moved: tuple[str, ...], **others: object) -> object:
        if metavar != "OLD=NEW":
            files = [each for each in moved if "=" not in each or Path(each).exists()]
            others["files"], moved = files, tuple(each for each in moved if each not in files)
        if wrong := [each for each in moved if not all(each.partition("=")[::2])]:
            raise click.UsageError(f"--data {wrong[0]}: give OLD=NEW, the recorded path and the one of today")
        with places.named(bases, dict(each.partition("=")[::2] for each in moved)):
            return command(*arguments, **others)

    data = click.option("--data", "moved", multiple=True, metavar=metavar, help=about)
    base = click.option("--base", "bases", multiple=True, metavar="PATH_OR_ID", help="The new place of the run's base.")
    return base(data(with_places))


class Steps(click.ParamType[tuple[int, int]]):
    """`437`, or `400..437`."""

    name = "steps"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        first, _, last = value.partition("..")
        if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
            self.fail(f"`{value}` is neither a step, like 437, nor two with `..` between, like 400..437")
        return int(first), int(last or first)


STEPS = Steps()
