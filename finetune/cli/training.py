"""The commands `plan`, `fetch`, `train`, `launch`, `rehearse` and `health`: from a recipe to a run, and its health."""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import NEW_RUN, OVERRIDE, PATH, RECIPE, default_run, how_to_train, where_it_is
from finetune.hosts.signals import ending_signals
from finetune.hosts.world import Flags
from finetune.store import places
from finetune.store.rank import is_alone, is_first
from finetune.store.run.directory import RunDirectory
from finetune.store.run.lease import refuse_other_directory

if TYPE_CHECKING:
    from finetune.recipe.load import LoadedRecipe
    from finetune.recipe.schema import Recipe
    from finetune.training.resolve import Resolved


@click.command()
@RECIPE
@OVERRIDE
@NEW_RUN
@click.option("--devices", "has_devices", is_flag=True, help="Also forecast the memory of 1 to 64 GPUs.")
@click.option(
    "--device-memory",
    "device_gib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory of one GPU. Default: that of this machine's GPU, or else 80.",
)
@answers
def plan(
    recipe: Path, overrides: tuple[str, ...], run: Path | None, has_devices: bool, device_gib: float | None
) -> Answer:
    """Show what your recipe will do: pins, rows, tokens, steps, memory, disk."""
    loaded = _looked_at(recipe, overrides)
    with importing():
        from finetune.package.preflight import refuse_unpackageable
        from finetune.package.publish import rights
        from finetune.training import preview

    # A missing right shows in seconds, and encoding the rows may take hours.
    rights.preflight(loaded.recipe)
    found = preview.preview(loaded, run or default_run(recipe), refuse_unpackageable, has_devices, device_gib)
    return Answer(found.facts, found.text, refuse=found.refuse_unready)


@click.command()
@RECIPE
@OVERRIDE
def fetch(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Download everything a recipe needs, for a host without a network."""
    loaded = _looked_at(recipe, overrides)
    with importing():
        from finetune.model import base
        from finetune.training.evaluation_sets import with_sets
        from finetune.training.resolve import resolve

    # This also downloads the data sets and encodes them, which `train` could not do without a network.
    resolved = with_sets(resolve(loaded))
    click.echo(base.directory(resolved.plan.recipe.base, resolved.plan.base, as_trained=True))


class HowToTrain(TypedDict):
    until: int | None
    schedule: str | None
    take_over: bool


@click.command()
@RECIPE
@OVERRIDE
@NEW_RUN
@how_to_train
@where_it_is
def train(
    recipe: Path, overrides: tuple[str, ...], run: Path | None, quiet: bool, **choices: Unpack[HowToTrain]
) -> None:
    """Train a recipe: start its run, or resume it where it stopped."""
    # Nothing is trained yet, so a signal ends the process at once. `run` takes over when there is something to save.
    for number in ending_signals():
        signal.signal(number, lambda received, frame: os._exit(128 + received))
    # SIGUSR1 asks for a save. Its default action would kill a training that is only starting.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    run = run or default_run(recipe)
    # Typing errors and missing files are said here, seconds before torch is there.
    loaded = _looked_at(recipe, overrides, run)
    with importing():
        from finetune.data import readings, unused
        from finetune.package.preflight import refuse_unpackageable
        from finetune.training.run import train as train_run

    def ask(resolved: "Resolved") -> None:
        bad = readings.warning(resolved.plan, resolved.train, resolved.holdout)
        for line in (*bad, *unused.warning(unused.lost(resolved.plan, resolved.train))):
            click.echo(line, err=True)
        # Weeks of training are lost if the result cannot be packaged: a small model of the same kind is packaged first.
        refuse_unpackageable(resolved)

    with _published(loaded.recipe, run):
        train_run(loaded, run, is_quiet=quiet, ask=ask, **choices)


@click.command()
@click.option(
    "--nproc-per-node", "processes", type=click.IntRange(min=1), help="Processes on this host. Default: one a GPU."
)
@click.option(
    "--nnodes", "nodes", type=click.IntRange(min=1), help="Hosts. Default: as Slurm or Kubernetes says, else 1."
)
@click.option("--node-rank", "node", type=click.IntRange(min=0), help="The number of this host, counted from 0.")
@click.option("--master-addr", "address", help="The address of host 0, seen from the others.")
@click.option("--master-port", "port", type=click.IntRange(1, 65535), help="A free port of host 0.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many times to restart a crashed training from its last commit.",
)
@RECIPE
@OVERRIDE
@NEW_RUN
@how_to_train
@where_it_is
def launch(
    recipe: Path,
    overrides: tuple[str, ...],
    run: Path | None,
    quiet: bool,
    until: int | None,
    schedule: str | None,
    take_over: bool,
    restarts: int,
    **asked: Unpack[Flags],
) -> None:
    """Train a recipe on all devices here, in a container or a job: signals reach every rank."""
    from finetune.hosts import launch as launching

    run = run or default_run(recipe)
    # Mistakes in the recipe show once here, and not once from every rank.
    grace = _looked_at(recipe, overrides, run).recipe.checkpoint.grace_seconds
    arguments = [*(f"--set={override}" for override in overrides), f"--run={run}"]
    arguments += places.arguments() + ["--quiet"] * quiet + ["--take-over"] * take_over
    arguments += [f"--{name}={value}" for name, value in (("until", until), ("schedule", schedule)) if value]
    # `--`, because the recipe's file name may begin with a dash.
    launching.launch(asked, [*arguments, "--", str(recipe)], run, restarts, grace)


class HowToRehearse(TypedDict):
    steps: int
    launcher: str
    has_package: bool
    is_kept: bool


@click.command()
@RECIPE
@OVERRIDE
@NEW_RUN
@click.option(
    "--steps", type=click.IntRange(min=2), default=2, show_default=True, help="Steps before the kill, and after it."
)
@click.option("--launcher", default="", metavar="COMMAND", help="Starts trainings, like 'finetune launch'.")
@click.option("--package/--no-package", "has_package", default=True, help="Whether to package the result as well.")
@click.option("--keep", "is_kept", is_flag=True, help="Keep the scratch directory, <run>.rehearsal.")
@answers
def rehearse(recipe: Path, overrides: tuple[str, ...], run: Path | None, **choices: Unpack[HowToRehearse]) -> Answer:
    """Prove here that a killed run resumes to the bit, and measure the cost of saves."""
    loaded = _looked_at(recipe, overrides)
    from finetune.debug.rehearse import rehearse as rehearsals

    facts = rehearsals.rehearse(rehearsals.Rehearsal(loaded, overrides, run or default_run(recipe), **choices))
    return Answer(facts, rehearsals.listing(facts), is_good=facts["ok"])


@click.command()
@click.argument("run", type=PATH, required=False)
@click.option(
    "--patience",
    "patience_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="Never call a training hung before this many seconds without a record.",
)
@answers
def health(run: Path | None, patience_seconds: float) -> Answer:
    """Tell a hung training from a slow one; without RUN, check all trainings here."""
    from finetune.hosts import health as looking

    # A run that you name is judged by its records alone.
    each = (
        [looking.look(run, patience_seconds)]
        if run
        else looking.look_at_all(looking.trainings(_run_of), patience_seconds)
    )
    facts: looking.HealthReport = {"ok": all(one["ok"] for one in each), "runs": each}
    return Answer(facts, looking.listing(facts), is_good=facts["ok"])


def _run_of(command: str, arguments: Sequence[str]) -> Path | None:
    """The run of `train` or `launch` with these arguments; None if it ends at once, as with --help."""
    asked = {"train": train, "launch": launch}[command]
    # Resilient: click then neither prints --help and exits, nor refuses a missing argument.
    given = asked.make_context(command, [*arguments], resilient_parsing=True).params
    return given["run"] or (default_run(given["recipe"]) if given["recipe"] else None)


def _looked_at(recipe: Path, overrides: Sequence[str], run: Path | None = None) -> "LoadedRecipe":
    """Loads the recipe, and checks its data before torch is imported. An existing run has its own pins."""
    from finetune.recipe.load import load

    loaded = load(recipe, overrides)
    if run:
        refuse_other_directory(run)
    # One process looks for all: several would all read the same files, and all say the same.
    if is_alone(os.environ) and not (run and RunDirectory(run).is_run):
        from finetune.data import preflight

        preflight.check(loaded)
    return loaded


@contextlib.contextmanager
def _published(recipe: "Recipe", run: Path) -> Iterator[None]:
    """Checks before a training that it can be published, and publishes its milestones meanwhile, on rank 0."""
    if recipe.publish is None or not is_first(os.environ):
        yield
        return
    from finetune.package.publish import queue
    from finetune.package.publish.rights import preflight

    # A token without rights, or a name that is taken, shows now and not after the training.
    preflight(recipe)
    # A separate process: uploads are slow, and a Hub that is down must not stop the training.
    child = queue.start(run) if recipe.publish.milestones else None
    yield  # after a signal or an error the child is on its own: it publishes what is committed, and ends
    if child:
        queue.finish(child, run)
