"""`log`, `show`, `verify` and `prune`: what a run or a package holds, whether it is intact, and what may go."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import PATH, REF, RUN, RUN_TO_READ
from finetune.errors import counted
from finetune.store.run.directory import PINS

if TYPE_CHECKING:
    from finetune.store.run.shown import Verification


@click.command()
@RUN_TO_READ
@answers
def log(run: Path) -> Answer:
    """Show a run: its checkpoints, incidents, and branches."""
    from finetune.store.run import inspect

    facts = inspect.log(run)
    return Answer(facts, inspect.tree(facts))


@click.command()
@REF
@answers
def show(ref: str) -> Answer:
    """Show a checkpoint: step, parent, figures, files."""
    from finetune.store.run import inspect

    facts = inspect.describe(ref)
    return Answer(facts, inspect.listing(facts))


@click.command()
@click.argument("ref", metavar="REF|DIR|hub:OWNER/NAME@REVISION")
@click.option("--key", type=PATH, metavar="PEM", help="The public key that signed the package.")
@answers
def verify(ref: str, key: Path | None) -> Answer:
    """Check every byte of a checkpoint or a run, or a whole package, here or on the Hub."""
    from finetune.store.run import inspect

    if inspect.is_model(ref):
        with importing():
            from finetune.package.verify.verify import verify as verify_package

        report = verify_package(ref, key)
        under = f"\nlies on: {report['lies_on']}" if "lies_on" in report else ""
        left_out = "".join(f"\nnot checked: {name}: {why}" for name, why in report["not_made"].items())
        held = f"nothing wrong by {counted(len(report['checks']), 'check')}: {', '.join(report['checks'])}{under}{left_out}"
        facts: Verification = report
    elif key:
        raise click.UsageError("--key goes with a package: checkpoints of a run are not signed")
    else:
        problems = inspect.problems(ref)
        facts, held = {"ok": not problems, "problems": problems}, "every byte is as it was committed"
    lines = [
        ": ".join(filter(None, (problem["file"], problem["tensor"], problem["message"])))
        for problem in facts["problems"]
    ]
    return Answer(facts, "\n".join(lines) or held, is_good=facts["ok"])


@click.command()
@RUN
@click.option(
    "--last", type=click.IntRange(min=1), help="Keep the N newest checkpoints, instead of the recipe's number."
)
@click.option("--best", type=click.IntRange(min=1), help="Keep the N checkpoints with the lowest held-out loss.")
@click.option(
    "--every", type=click.IntRange(min=1), metavar="STEPS", help="Keep checkpoints at multiples of this many steps."
)
@click.option(
    "--weights-every",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Keep checkpoints at multiples as weights alone.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would happen.")
@answers
def prune(run: Path, dry_run: bool, **keep: int | None) -> Answer:
    """Apply the keep rules of a run now, or other rules."""
    from finetune.plan.disk import readable
    from finetune.store.checkpoints.pruning import prune as prune_run

    actions, pinned = prune_run(run, keep, dry_run)
    freed = sum(action["bytes"] for action in actions)
    lines = [f"{action['action']} {action['ref']} ({readable(action['bytes'])})" for action in actions]
    lines += [
        f"kept {item['ref']}: pinned by {', '.join(f'{PINS}/{name}' for name in item['pins'])}" for item in pinned
    ]
    lines.append(f"{'would free' if dry_run else 'freed'} {readable(freed)}")
    facts = {"actions": actions, "pinned": pinned, "freed_bytes": freed, "is_dry_run": dry_run}
    return Answer(facts, "\n".join(lines))
