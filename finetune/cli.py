"""The command line: one thin function a command. Whatever imports torch is imported inside.

Data goes to stdout, messages to stderr. Exit codes: 0 done, 1 a FinetuneError, 2 usage or recipe, 143, 130 and 129 after signals.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from finetune import __version__
from finetune.errors import CheckpointError, DataError, FinetuneError, RecipeError, Stopped, counted
from finetune.hosts import stderr
from finetune.hosts.signals import ending_signals
from finetune.hosts.world import TOLD, prepare_allocator
from finetune.store import places
from finetune.store.checkpoints.manifest import to_json
from finetune.store.rank import is_alone, is_first
from finetune.store.run.lease import refuse_other_directory
from finetune.training.saving.writer import WRITER

if TYPE_CHECKING:
    from finetune.recipe.load import LoadedRecipe
    from finetune.recipe.schema import Recipe
    from finetune.training.resolve import Resolved

OVERRIDE = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, like train.seed=1."
)
RUN = click.option("--run", type=click.Path(path_type=Path), help="The run directory. Default: runs/<recipe name>.")
JSON = click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
REFS = click.argument("refs", nargs=-1, required=True, metavar="REF...")


def where_it_is(command: Callable) -> Callable:
    """The options of every command that opens a run: where its base and data are, if they were moved."""

    @functools.wraps(command)
    def with_places(*arguments: object, bases: tuple[str, ...], moved: tuple[str, ...], **others: object) -> object:
        if wrong := [each for each in moved if not all(each.partition("=")[::2])]:
            raise click.UsageError(f"--data {wrong[0]}: give OLD=NEW, the recorded path and the one of today")
        with places.named(bases, dict(each.partition("=")[::2] for each in moved)):
            return command(*arguments, **others)

    data = click.option(
        "--data", "moved", multiple=True, metavar="OLD=NEW", help="Where a data file or folder of the run is now."
    )
    base = click.option(
        "--base", "bases", multiple=True, metavar="PATH_OR_ID", help="Where the base of the run is now."
    )
    return base(data(with_places))


class Steps(click.ParamType):
    """`437`, or `400..437`."""

    name = "steps"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        first, _, last = value.partition("..")
        if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
            self.fail(f"`{value}` is neither a step, like 437, nor two with `..` between, like 400..437")
        return int(first), int(last or first)


STEPS = Steps()
MOST_ROWS = 1000  # bad ones that an error lists as JSON


def how_to_train(command: Callable) -> Callable:
    """The options of `train` beside what is trained; `launch` hands them on."""
    for option in reversed(
        (
            click.option("--quiet", is_flag=True, help="Print commits and problems only."),
            click.option(
                "--until", type=click.IntRange(min=1), metavar="STEP", help="Stop after this step, committed."
            ),
            click.option(
                "--schedule",
                type=click.Choice(["continue", "restart"]),
                help="How the learning rate of a run that is extended goes on. Default: continue.",
            ),
            click.option(
                "--take-over",
                is_flag=True,
                help="Where the file system has no locks: take a run whose holder's heartbeat has stopped (waits 30 seconds).",
            ),
        )
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Fine-tune pretrained checkpoints; every checkpoint is a commit.

    A REF is RUN@STEP, RUN@last, RUN@best, a checkpoint or model directory, or a Hub id with @revision.
    """


@cli.command()
@RECIPE
@OVERRIDE
@RUN
@click.option("--devices", "has_devices", is_flag=True, help="Also forecast the memory of 1 to 64 GPUs.")
@click.option(
    "--device-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory of one of them. Default: that of this machine's GPU, or else 80.",
)
@JSON
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    run: Path | None,
    has_devices: bool,
    device_memory: float | None,
    is_json: bool,
) -> None:
    """Show what a recipe will do: pins, rows, tokens, steps, memory, disk."""
    loaded = _looked_at(recipe, overrides)
    from finetune.data import unused
    from finetune.model import base
    from finetune.package.preflight import refuse_unpackageable
    from finetune.package.publish.rights import preflight
    from finetune.plan import forecast
    from finetune.plan.memory import Work, shape_of
    from finetune.plan.pace import largest_step
    from finetune.training.build import slow_numbers
    from finetune.training.readiness import refuse_unfit_base, refuse_unready
    from finetune.training.resolve import device, resolve

    preflight(loaded.recipe)
    run = run or _default_run(recipe)
    if not has_devices:
        refuse_other_directory(run)
    resolved, here = resolve(loaded), device()
    if not has_devices:  # that table is made of the config alone, so the weights may be elsewhere
        refuse_unfit_base(resolved)
    refuse_unpackageable(resolved)
    shape = shape_of(base.load_config(resolved.base_directory))
    work = Work(resolved.micro_batch_tokens, largest_step(resolved.plan, resolved.train.lengths))
    facts = forecast.forecast(resolved.plan, shape, work, here, run)
    card = round(device_memory * 2**30) if device_memory else here.bytes if here.is_gpu else forecast.CARD_BYTES
    ignored = unused.columns(resolved.plan, resolved.train, resolved.holdout)
    facts |= {"ignored_columns": ignored, **unused.lost(resolved.plan, resolved.train)}
    facts |= {"base_notes": list(resolved.notes), "reached": resolved.reached}
    facts["notes"] += filter(None, [slow_numbers(resolved.plan.recipe.train.precision)])
    facts |= {"device_memory_bytes": card, "devices": forecast.on_devices(resolved.plan, shape, work, card)}
    about_base = forecast.base_lines(resolved.notes, resolved.reached)
    text = "\n".join([forecast.table(facts), *about_base, *unused.lines(facts)])
    if has_devices:  # it is asked for other machines, so the disk of this one is no reason to refuse
        _print(facts, f"{text}\n\n{forecast.devices_table(facts)}", is_json)
        return
    if not is_json:
        click.echo(text)
    refuse_unready(resolved, run)
    if is_json:  # after it: one object, the error's or this
        click.echo(json.dumps(facts))


@cli.command()
@RECIPE
@OVERRIDE
def fetch(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Download what a recipe names, for a host without a network."""
    loaded = _looked_at(recipe, overrides)
    from finetune.model import base
    from finetune.training.resolve import resolve

    resolved = resolve(loaded)
    click.echo(base.directory(resolved.plan.recipe.base, resolved.plan.base))


@cli.command()
@RECIPE
@OVERRIDE
@RUN
@how_to_train
@where_it_is
def train(recipe: Path, overrides: tuple[str, ...], run: Path | None, quiet: bool, **choices: object) -> None:
    """Train a recipe: start its run, or resume it where it stopped."""
    for number in ending_signals():  # until `run` has something to save
        signal.signal(number, lambda received, frame: os._exit(128 + received))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    run = run or _default_run(recipe)
    loaded = _looked_at(recipe, overrides, run)
    from finetune.data import unused
    from finetune.package.preflight import refuse_unpackageable
    from finetune.training.run import train as train_run

    def ask(resolved: "Resolved") -> None:
        for line in unused.warning(unused.lost(resolved.plan, resolved.train)):
            click.echo(line, err=True)
        refuse_unpackageable(resolved)

    with _published(loaded.recipe, run):
        train_run(loaded, run, is_quiet=quiet, ask=ask, **choices)


@cli.command()
@click.option(
    "--nproc-per-node", "processes", type=click.IntRange(min=1), help="Processes on this host. Default: one a GPU."
)
@click.option(
    "--nnodes", "nodes", type=click.IntRange(min=1), help="Hosts. Default: as Slurm or Kubernetes says, else 1."
)
@click.option("--node-rank", "node", type=click.IntRange(min=0), help="Which of them this is, counted from 0.")
@click.option("--master-addr", "address", help="Host 0, as the others call it.")
@click.option("--master-port", "port", type=click.IntRange(1, 65535), help="A free port of host 0.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How often a crashed training is started again from its last commit.",
)
@RECIPE
@OVERRIDE
@RUN
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
    **asked: object,
) -> None:
    """Train a recipe on all devices here, as the one process of a container or a job: signals reach every rank."""
    from finetune.hosts import launch as launching

    run = run or _default_run(recipe)
    grace = _looked_at(recipe, overrides, run).recipe.checkpoint.grace_seconds
    arguments = [*(f"--set={override}" for override in overrides), f"--run={run}"]
    arguments += places.arguments() + ["--quiet"] * quiet + ["--take-over"] * take_over
    arguments += [f"--{name}={value}" for name, value in (("until", until), ("schedule", schedule)) if value]
    launching.launch(asked, [*arguments, "--", str(recipe)], run, restarts, grace)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--patience",
    "patience_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="Less than this without a record is never called hung.",
)
@JSON
def health(run: Path | None, patience_seconds: float, is_json: bool) -> None:
    """Tell a hung training from a slow one; without RUN, all that are trained here."""
    from finetune.hosts import health as looking

    runs = {run: 0.0} if run else looking.trainings(_run_of)
    each = [looking.look(run, patience_seconds, since) for run, since in runs.items()]
    facts = {"ok": all(one["ok"] for one in each), "runs": each}
    _print(facts, looking.listing(facts), is_json)
    if not facts["ok"]:
        sys.exit(FinetuneError.exit_code)


@cli.command()
@RECIPE
@OVERRIDE
@RUN
@click.option(
    "--steps", type=click.IntRange(min=2), default=2, show_default=True, help="Steps before the kill, and after it."
)
@click.option("--launcher", default="", metavar="COMMAND", help="Starts trainings, like 'finetune launch'.")
@click.option("--package/--no-package", "has_package", default=True, help="Whether to package the result as well.")
@click.option("--keep", "is_kept", is_flag=True, help="Leave the scratch directory, <run>.rehearsal.")
@JSON
def rehearse(recipe: Path, overrides: tuple[str, ...], run: Path | None, is_json: bool, **options: object) -> None:
    """Prove here that a killed run resumes to the bit, and measure what a checkpoint costs."""
    loaded = _looked_at(recipe, overrides)
    from finetune.debug.rehearse import rehearse as rehearsals

    facts = rehearsals.rehearse(rehearsals.Rehearsal(loaded, overrides, run or _default_run(recipe), **options))
    _print(facts, rehearsals.listing(facts), is_json)
    if not facts["ok"]:
        sys.exit(FinetuneError.exit_code)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@JSON
def log(run: Path, is_json: bool) -> None:
    """Show a run: its checkpoints, what went wrong, and the runs that branch off it."""
    from finetune.store.run import inspect

    facts = inspect.log(run)
    _print(facts, inspect.tree(facts), is_json)


@cli.command()
@click.argument("ref")
@JSON
def show(ref: str, is_json: bool) -> None:
    """Show what a checkpoint is: step, parent, figures, files."""
    from finetune.store.run import inspect

    facts = inspect.describe(ref)
    _print(facts, inspect.listing(facts), is_json)


@cli.command()
@click.argument("ref", metavar="REF|DIR|hub:OWNER/NAME@REVISION")
@click.option("--key", type=click.Path(path_type=Path), metavar="PEM", help="The public key that signed the package.")
@JSON
def verify(ref: str, key: Path | None, is_json: bool) -> None:
    """Check every byte of a checkpoint or a run, or all that can be checked of a package, here or on the Hub."""
    from finetune.store.run import inspect

    if inspect.is_model(ref):
        from finetune.package.verify.verify import verify as verify_package

        facts = verify_package(ref, key)
        left_out = "".join(f"\nnot checked: {name}: {why}" for name, why in facts["not_made"].items())
        held = f"nothing wrong by {counted(len(facts['checks']), 'check')}: {', '.join(facts['checks'])}{left_out}"
    else:
        if key:
            raise click.UsageError("--key goes with a package: checkpoints of a run are not signed")
        problems = inspect.problems(ref)
        facts, held = {"ok": not problems, "problems": problems}, "every byte is as it was committed"
    lines = [
        ": ".join(filter(None, (problem["file"], problem["tensor"], problem["message"])))
        for problem in facts["problems"]
    ]
    _print(facts, "\n".join(lines) or held, is_json)
    if not facts["ok"]:
        sys.exit(CheckpointError.exit_code)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", required=True, type=STEPS, metavar="A..B", help="A step, or the first and the last one.")
@click.option("--inspect", "is_inspected", is_flag=True, help="Print rows, token losses and gradients of the steps.")
@click.option(
    "--materialize", "is_materialized", is_flag=True, help="Commit the state after each of the steps as a checkpoint."
)
@JSON
@where_it_is
def replay(run: Path, steps: tuple[int, int], is_json: bool, **choices: bool) -> None:
    """Run steps of a run again, and compare them with its record to the bit."""
    from finetune.debug import replay as replays

    facts = replays.replay(run, *steps, **choices)
    _print(facts, replays.listing(facts), is_json)
    if not facts["identical"]:
        sys.exit(FinetuneError.exit_code)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--bad",
    multiple=True,
    metavar="COMPARISON|STEP",
    help="What is bad: 'loss > 4', 'grad_norm/layers.3 > 1', or 'loss~20 > 4' for the mean of 20 steps. A number is a step known to be bad.",
)
@click.option("--bad-evaluation", metavar="COMPARISON", help="The same of held-out figures, like 'perplexity > 9'.")
@click.option(
    "--bad-command",
    metavar="COMMAND",
    help="Ends with 0 where the checkpoint at {checkpoint} is good, with 125 where it cannot tell; else bad.",
)
@click.option("--good", type=click.IntRange(min=0), metavar="STEP", help="A step known to be good.")
@JSON
@where_it_is
def bisect(
    run: Path,
    bad: tuple[str, ...],
    bad_evaluation: str | None,
    bad_command: str | None,
    good: int | None,
    is_json: bool,
) -> None:
    """Find the step at which a run went wrong, and the rows that did it."""
    from finetune.debug import bisect as bisection

    steps, comparisons = ([each for each in bad if each.isdecimal() == is_step] for is_step in (True, False))
    if len(steps) > 1 or len(comparisons) > 1:
        raise click.UsageError("give --bad once with a comparison, and once with a step")
    known = int(steps[0]) if steps else None
    comparison = comparisons[0] if comparisons else None
    facts = bisection.bisect(
        run, comparison, bad_evaluation=bad_evaluation, bad_command=bad_command, good=good, bad=known
    )
    _print(facts, bisection.listing(facts), is_json)
    if facts["first_bad_step"] is None:
        sys.exit(FinetuneError.exit_code)


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE", help="A heat map of the weights, as PNG.")
@JSON
@where_it_is
def diff(a: str, b: str, picture: Path | None, is_json: bool) -> None:
    """Compare two checkpoints: recipes, figures, where their runs part, weights."""
    from finetune.debug import diff as comparison

    facts = comparison.diff(a, b, picture)
    _print(facts, comparison.listing(facts), is_json)


@cli.command()
@click.argument("ref")
@OVERRIDE
@click.option("--run", type=click.Path(path_type=Path), help="The new run's directory. Default: <run>-<step>.")
@click.option(
    "--skip-rows", metavar="FILE|IDS", help="Rows to leave out: ids like 512,77, or a file with a line for each."
)
@click.option(
    "--schedule",
    type=click.Choice(["continue", "restart"]),
    default="continue",
    show_default=True,
    help="Whether the learning rate goes on where it is, or begins a curve of its own.",
)
@click.option("--reset-optimizer", "is_optimizer_reset", is_flag=True, help="Begin without the optimizer's moments.")
@click.option("--quiet", is_flag=True, help="Print commits and problems only.")
@click.option("--until", type=click.IntRange(min=1), metavar="STEP", help="Stop after this step, committed.")
@click.option(
    "--no-train", is_flag=True, help="Only make the run; `finetune train DIR/recipe.yaml --run DIR` trains it."
)
@where_it_is
def branch(
    ref: str,
    overrides: tuple[str, ...],
    run: Path | None,
    skip_rows: str | None,
    schedule: str,
    is_optimizer_reset: bool,
    quiet: bool,
    until: int | None,
    no_train: bool,
) -> None:
    """Start a new run from a step of another one, with other keys, or without some rows."""
    from finetune.debug import branch as branches

    choices = branches.Choices(overrides, skip_rows, schedule, is_optimizer_reset)
    made = branches.branch(ref, run, choices, is_quiet=quiet, until=until, is_to_train=not no_train)
    if no_train:
        click.echo(made)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--last", type=click.IntRange(min=1), help="Keep the newest so many, instead of what the recipe says.")
@click.option("--best", type=click.IntRange(min=1), help="Keep the so many with the lowest held-out loss.")
@click.option("--every", type=click.IntRange(min=1), metavar="STEPS", help="Keep those at multiples of so many steps.")
@click.option(
    "--weights-every", type=click.IntRange(min=1), metavar="STEPS", help="Keep those at multiples as weights alone."
)
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@JSON
def prune(run: Path, dry_run: bool, is_json: bool, **keep: int | None) -> None:
    """Apply the keep rules of a run now, or other ones."""
    from finetune.plan.forecast import readable
    from finetune.store.checkpoints.pruning import prune as prune_run

    actions, pinned = prune_run(run, keep, dry_run)
    freed = sum(action["bytes"] for action in actions)
    lines = [f"{action['action']} {action['ref']} ({readable(action['bytes'])})" for action in actions]
    lines += [f"kept {item['ref']}: pinned by {', '.join(f'pins/{name}' for name in item['pins'])}" for item in pinned]
    lines.append(f"{'would free' if dry_run else 'freed'} {readable(freed)}")
    facts = {"actions": actions, "pinned": pinned, "freed_bytes": freed, "is_dry_run": dry_run}
    _print(facts, "\n".join(lines), is_json)


@cli.command()
@REFS
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Evaluate on the held-out rows of this recipe, not of the refs' own runs.",
)
@OVERRIDE
@click.option(
    "--seen", "is_seen_allowed", is_flag=True, help="Evaluate also on rows that were trained on, and say how many."
)
@JSON
@where_it_is
def evaluate(
    refs: tuple[str, ...], recipe: Path | None, overrides: tuple[str, ...], is_seen_allowed: bool, is_json: bool
) -> None:
    """Evaluate models on held-out rows."""
    if overrides and not recipe:
        raise click.UsageError("--set goes with --recipe: a run's own rows are those of its plan")
    from finetune.compare.evaluate import evaluate as evaluate_refs

    results = evaluate_refs(refs, recipe, overrides, is_seen_allowed)
    lines = [
        f"{result['ref']}: "
        + "  ".join(f"{name} {value:.6g}" for name, value in result["metrics"].items())
        + (f"  seen rows {'unknown' if result['seen_rows'] is None else result['seen_rows']}" if result["seen"] else "")
        + ("" if result["is_comparable"] else "  other held-out rows")
        for result in results
    ]
    _print({"results": results}, "\n".join(lines), is_json)


@cli.command()
@REFS
@click.option("--prompt", "prompts", multiple=True, help="What to answer; may be given several times.")
@click.option("--prompt-file", type=click.File(), help="A file with one prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="The longest answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option("--seed", default=0, show_default=True, help="Decides the samples when the temperature is not 0.")
@JSON
@where_it_is
def generate(refs, prompts, prompt_file, max_new_tokens, temperature, seed, is_json) -> None:  # noqa: ANN001 click's options
    """Let models answer prompts."""
    prompts = [*prompts, *([prompt_file.read().strip()] if prompt_file else [])]
    if not prompts:
        raise click.UsageError("give --prompt TEXT or --prompt-file FILE")
    from finetune.compare.generate import generate as generate_answers

    results = generate_answers(refs, prompts, max_new_tokens, temperature, seed)
    _print({"results": results}, "\n".join(f"--- {result['ref']}\n{result['text']}" for result in results), is_json)


@cli.command()
@click.argument("ref")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--sign", "key", type=click.Path(path_type=Path), metavar="PEM", help="Sign it with this private key.")
@click.option(
    "--average",
    "steps",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="STEP",
    help="Package the mean of the weights of REF and of this step; may be given several times.",
)
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp32"]), help="Type of the weights. Default: package.dtype of the recipe."
)
@JSON
@where_it_is
def package(
    ref: str, directory: Path, key: Path | None, steps: tuple[int, ...], dtype: str | None, is_json: bool
) -> None:
    """Write a checkpoint as a model folder that is proven to be what was trained."""
    from finetune.compare.evaluate import of_model
    from finetune.package import export

    facts = export.package(ref, directory, key, export.Average(steps, of_model) if steps else None, dtype=dtype)
    lines = [f"{check['name']}: {check['message']}" for check in facts["checks"]]
    _print(facts, "\n".join([*lines, f"packaged {ref} as {directory}"]), is_json)


@cli.command()
@click.argument("source", metavar="DIR|REF")
@click.option("--to", "target", metavar="OWNER/NAME|folder:PATH", help="Default: publish.repo of the recipe of a REF.")
@click.option("--branch", default="main", show_default=True, help="The branch that will have the package.")
@click.option("--tag", help="A tag for the commit.")
@click.option("--public", "is_public", is_flag=True, help="Publish where everybody can see it. Default: private.")
@click.option("--replace", "is_replacing", is_flag=True, help="Overwrite what people changed; what they added stays.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only say what would happen.")
@click.option("--milestones", "has_milestones", is_flag=True, help="Publish the milestones of a run that are left.")
@click.option(
    "--follow", "is_following", is_flag=True, help="With --milestones: go on until stdin ends, as beside a training."
)
@JSON
@where_it_is
def publish(
    source: str,
    target: str | None,
    is_public: bool,
    is_replacing: bool,
    has_milestones: bool,
    is_following: bool,
    is_json: bool,
    **choices: object,
) -> None:
    """Put a package on the Hub as it is, in one commit, or not at all."""
    if has_milestones:
        from finetune.package.publish import queue

        facts = queue.follow(Path(source), target, is_following, is_public, is_replacing)
        _print(facts, f"{counted(len(facts['published']), 'milestone')} published", is_json)
        return
    from finetune.package.publish import publish as publishing

    directory, target, is_private = publishing.prepared(source, target, is_public)
    chosen = publishing.Choices(is_private=is_private, is_replacing=is_replacing, **choices)
    facts = publishing.publish(directory, target, chosen)
    _print(facts, publishing.listing(facts), is_json)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
def schema(file: Path | None) -> None:
    """Print the JSON Schema of recipes, or write it to a file."""
    from finetune.recipe.schema import Recipe

    text = json.dumps(Recipe.model_json_schema(), indent=1) + "\n"
    if file:
        file.write_text(text)
    else:
        click.echo(text, nl=False)


@cli.command()
@JSON
def doctor(is_json: bool) -> None:
    """Look at this machine: versions, devices, memory, disk."""
    from finetune.hosts import doctor as examination

    facts = examination.facts()
    _print(facts, examination.listing(facts), is_json)


def main() -> None:
    """The console script: errors become messages and exit codes."""
    told = os.environ.pop(TOLD, None)  # not for processes that this one starts
    stderr.secure()
    prepare_allocator(os.environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except click.ClickException as error:
        _tell(told, "usage")
        if "--json" in sys.argv:
            click.echo(
                json.dumps({"error": {"code": "usage", "message": error.format_message(), "where": None, "hint": None}})
            )
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except Stopped as stop:
        sys.exit(stop.exit_code)
    except (FinetuneError, RuntimeError) as error:
        known = error if isinstance(error, FinetuneError) else _lost_rank(error)
        if known is None:
            raise
        _report(known)
        _tell(told, known.code)
        _leave(known.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `finetune log … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _looked_at(recipe: Path, overrides: Sequence[str], run: Path | None = None) -> "LoadedRecipe":
    """The recipe, with a look at its data before torch is imported. A run that exists has pins of its own."""
    from finetune.recipe.load import load

    loaded = load(recipe, overrides)
    if run:
        refuse_other_directory(run)
    if is_alone(os.environ) and not (run and (run / "plan.json").exists()):
        from finetune.data import preflight

        preflight.check(loaded)
    return loaded


def _leave(exit_code: int) -> NoReturn:
    """Ends the process also while a hung disk holds a thread: it may wake in native code, and abort an interpreter that ends."""
    if any(thread.name == WRITER for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


@contextlib.contextmanager
def _published(recipe: "Recipe", run: Path) -> Iterator[None]:
    """Checks before a training that it can be published, and has its milestones published beside it, by rank 0."""
    if recipe.publish is None or not is_first(os.environ):
        yield
        return
    from finetune.package.publish import queue
    from finetune.package.publish.rights import preflight

    preflight(recipe)
    child = queue.start(run) if recipe.publish.milestones else None
    yield  # after a signal or an error the child is on its own: it publishes what is committed, and ends
    if child:
        queue.finish(child, run)


def _lost_rank(error: RuntimeError) -> FinetuneError | None:
    """What a rank says when another one is gone; None for a bug."""
    if is_alone(os.environ):
        return None
    from finetune.training.collectives import lost_rank

    return lost_rank(error)


def _tell(told: str | None, code: str) -> None:
    """Lets `launch` know that this is no crash: it would start the training again."""
    if told:
        with contextlib.suppress(OSError):  # it is gone
            os.write(int(told), code.encode())


def _report(error: FinetuneError) -> None:
    if not is_first(os.environ) and isinstance(error, RecipeError):  # all ranks meet it; one says so
        return
    if "--json" in sys.argv:
        facts = {"code": error.code, "message": error.message, "where": error.where, "hint": error.hint}
        if isinstance(error, DataError) and len(error.parts) > 1:
            facts["rows"] = [{"where": part.where, "message": part.message} for part in error.parts[:MOST_ROWS]]
        click.echo(json.dumps({"error": facts}))
    click.echo(str(error), err=True)


def _print(facts: dict, text: str, is_json: bool) -> None:
    if is_first(os.environ):  # all ranks know it; one says so
        click.echo(to_json(facts) if is_json else text)


def _default_run(recipe: Path) -> Path:
    return Path(os.environ.get("FINETUNE_RUNS", "runs")) / recipe.stem


def _run_of(command: str, arguments: Sequence[str]) -> Path | None:
    """Where `train` or `launch` trains when it is given these arguments; None where it ends at once, as with --help."""
    given = cli.commands[command].make_context(command, [*arguments], resilient_parsing=True).params
    return given["run"] or (_default_run(given["recipe"]) if given["recipe"] else None)
