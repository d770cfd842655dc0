"""`sweep`: many trainings of one recipe with other settings, and the best of them."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import PATH, default_run
from finetune.errors import duration
from finetune.hosts.world import devices_here

if TYPE_CHECKING:
    from finetune.compare.sweep.asked import Question
    from finetune.compare.sweep.directory import Sweep
    from finetune.compare.sweep.report import SweepReport
    from finetune.training.resolve import Resolved


class Options(TypedDict):
    overrides: tuple[str, ...]
    random: int | None
    tpe: int | None
    seed: int
    halving: int | None
    rungs: tuple[int, ...]
    workers: int | None
    is_worker: bool
    is_retrying: bool
    is_dry: bool


class Rungs(click.ParamType[tuple[int, ...]]):
    """`20,80`."""

    name = "steps"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = value.split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            self.fail(f"`{value}` is not like 20,80: steps with commas between")
        return tuple(map(int, words))


@click.command()
@click.argument("recipe", type=PATH)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUES",
    help="Values to try, like optimizer.learning_rate=[1e-4,2e-4], or a range: log(1e-5,1e-3), uniform(0,0.1), int(4,64). One value is a plain override.",
)
@click.option("--sweep", "path", type=PATH, help="The sweep's directory. Default: runs/<recipe name>-sweep.")
@click.option("--random", type=click.IntRange(min=1), metavar="N", help="Draw N trials. Default: all combinations.")
@click.option(
    "--tpe", type=click.IntRange(min=1), metavar="N", help="Let Optuna's TPE choose N trials, one after the other."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides what is drawn.")
@click.option(
    "--halving",
    type=click.IntRange(min=2),
    metavar="FACTOR",
    help="Train all for some steps, the best 1/FACTOR of them for more, and so on.",
)
@click.option("--rungs", type=Rungs(), default=(), metavar="STEPS", help="Where halving compares, like 20,80.")
@click.option(
    "--workers", type=click.IntRange(min=0), help="Trainings at a time here; 0 only prepares. Default: one a GPU, or 1."
)
@click.option(
    "--worker", "is_worker", is_flag=True, help="Help with the sweep in this directory, until nothing is left."
)
@click.option("--retry-failed", "is_retrying", is_flag=True, help="Train failed trials again.")
@click.option(
    "--dry-run", "is_dry", is_flag=True, help="Print trials, steps, tokens and a measured time; train nothing."
)
@answers
def sweep(recipe: Path, path: Path | None, **options: Unpack[Options]) -> Answer:
    """Train a recipe with many settings, here or on several hosts, and compare them.

    The same command continues a sweep; so does `finetune sweep DIR`.
    """
    from finetune.compare.sweep import directory

    if options["is_worker"] or directory.exists(recipe):
        return _worked(_existing(recipe, path, options), options)
    from finetune.compare.sweep.asked import Asked, checked

    question = checked(
        Asked(
            recipe,
            options["overrides"],
            random=options["random"],
            tpe=options["tpe"],
            seed=options["seed"],
            halving=options["halving"],
            rungs=options["rungs"],
        )
    )
    path = path or default_run(recipe).with_name(f"{recipe.stem}-sweep")
    if directory.exists(path):
        found = directory.opened(path)
        directory.refuse_other(found, question.record, question.loaded)
        return _worked(found, options)
    return _begun(question, path, options)


def _existing(path: Path, named: Path | None, options: Options) -> "Sweep":
    """The sweep in a directory that was named in place of a recipe."""
    from finetune.compare.sweep import directory
    from finetune.compare.sweep.space import corners
    from finetune.data import preflight

    how_to_search = (options["overrides"], options["random"], options["tpe"], options["seed"], options["halving"])
    if named or options["rungs"] or any(how_to_search):
        raise click.UsageError(f"{path} has its settings: give only --workers, --worker, --retry-failed and --dry-run")
    found = directory.opened(path)
    # A worker in a wrong folder must not begin a trial.
    preflight.check(found.recipe_with(next(corners(found.spec.space))))
    return found


def _begun(question: "Question", path: Path, options: Options) -> Answer:
    from finetune.compare.sweep import directory
    from finetune.data import preflight

    directory.refuse_place(path)
    preflight.check(question.recipe_of(question.settings[0]))
    if question.asked.tpe:
        from finetune.compare.sweep import tpe

        tpe.optuna()
    with importing():
        from finetune.compare.sweep import forecast, preview

    workers = _workers(options)
    spec = preview.spec_of(question, path, workers or 1, _ask)
    about = [*preview.lines(spec, workers or 1)]
    if options["is_dry"]:
        seconds = forecast.seconds(spec, question.loaded, path.absolute().parent, workers or 1)
        return _answer(
            directory.Sweep(path, spec, question.loaded),
            [*about, f"time        about {duration(seconds)}", ""],
            seconds,
        )
    _say("\n".join(about))
    made = directory.create(path, spec, question.loaded)
    directory.refuse_other(made, question.record, question.loaded)  # another process may have been faster
    return _worked(made, options)


def _worked(sweep: "Sweep", options: Options) -> Answer:
    """Trains what is due, and answers with all that became of the sweep."""
    from finetune.compare.sweep import conclusion, report, work

    if options["is_dry"]:
        return _answer(sweep, [], None)
    if options["is_retrying"]:
        work.retry(sweep, _say)
    if workers := _workers(options):
        work.work(sweep, workers, _say)
        facts = report.report_of(sweep, leaders=conclusion.leaders)
        report.write(sweep, facts)
        conclusion.report(sweep, facts["trials"])
        return _told(sweep, facts, [])
    _say(f"prepared: start `finetune sweep {sweep.path} --worker` on each host, in this folder")
    return _answer(sweep, [], None)


def _answer(sweep: "Sweep", before: list[str], seconds: float | None) -> Answer:
    from finetune.compare.sweep import report

    return _told(sweep, report.report_of(sweep, seconds), before)


def _told(sweep: "Sweep", facts: "SweepReport", before: list[str]) -> Answer:
    from finetune.compare.sweep import report

    return Answer(
        facts, "\n".join([*before, report.table(facts, sweep.spec.tried)]), refuse=partial(report.refuse_failed, facts)
    )


def _workers(options: Options) -> int:
    """As asked, or one for each GPU."""
    workers = options["workers"]
    return (devices_here(os.environ) or 1) if workers is None else workers


def _ask(resolved: "Resolved") -> None:
    """What `train` asks before it begins."""
    from finetune.data import readings, unused
    from finetune.package.preflight import refuse_unpackageable

    bad = readings.warning(resolved.plan, resolved.train, resolved.holdout)
    for line in (*bad, *unused.warning(unused.lost(resolved.plan, resolved.train))):
        _say(line)
    refuse_unpackageable(resolved)


def _say(line: str) -> None:
    click.echo(line, err=True)
