"""Refusals of a package: a ref, a target or a base that none can be made from, and a folder that must not become one."""

from pathlib import Path

from finetune.errors import PackageError
from finetune.model import adapters
from finetune.package.card.facts import hub_base
from finetune.package.verify.verify import folder_findings
from finetune.plan.plan import Plan
from finetune.store.checkpoints.refs import parse, run_of
from finetune.store.durable import failures
from finetune.training.opened import Opened

TEXT_FILES = {".json", ".jsonl", ".jinja", ".yaml", ".md", ".txt"}


def run_of_ref(ref: str) -> Path:
    """The run directory around a checkpoint; a package needs its plan and journal."""
    parsed = parse(ref)
    run = run_of(parsed) if parsed.kind == "run" or parsed.kind == "checkpoint" else None
    if run is None:
        what = "is no folder that is here, and" if parsed.kind == "hub" else "is"
        hint = "name RUN@STEP, RUN@last, RUN@best or a checkpoint in a run"
        raise PackageError(f"{what} not a checkpoint of a run", where=ref, hint=hint)
    return run


def refuse_average(ref: str, opened: Opened, is_averaged_again: bool) -> None:
    """Refuses an average that nobody has evaluated, and a form that it does not have."""
    plan, manifest = opened.run_plan, opened.run_checkpoint.manifest
    if is_averaged_again:
        raise PackageError("is an average already", where=ref, hint="name all members to `finetune average`")
    if plan.holdout_counts.examples and not manifest.metrics:
        hint = "make it again without --no-evaluate"
        raise PackageError("is an average that was not evaluated", where=ref, hint=hint)
    if plan.recipe.package.form == "adapter" and not adapters.is_adapter(opened.model):
        hint = "set `package.form: merged`, or average adapters with fewer members or --rank"
        raise PackageError("is an average of whole weights, and no adapter", where=ref, hint=hint)


def refuse_existing(directory: Path) -> None:
    with failures(directory, PackageError, what="cannot be read"):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise PackageError(
                "is there already", where=str(directory), hint="name a new directory, or remove this one"
            )


def refuse_unnamed_base(plan: Plan, form: str) -> None:
    if form == "adapter" and hub_base(plan) is None:
        raise PackageError(
            "an adapter of a local base would name a base that others do not have",
            where="package.form",
            hint="set base.origin to the Hub checkpoint it is equal to, or use `merged`",
        )


def refuse_wrong(directory: Path) -> None:
    """Runs the checks of `verify` on the folder before it is a package."""
    for check, file, tensor, message in folder_findings(directory)[1]:
        told = ": ".join(filter(None, (file, tensor, message)))
        raise PackageError(f"{check}: {told}", where="package", hint="fix its cause; nothing was written")


def refuse_private(directory: Path, places: list[Path]) -> None:
    """Refuses a folder of this machine: it reveals its user and layout, and means nothing to others."""
    private = {str(place.absolute().parent) for place in places} | {str(Path.home()), str(Path.cwd())}
    private = {place for place in private if place.count("/") > 1}  # `/` and `/root` are everywhere
    for file in sorted(file for file in directory.rglob("*") if file.suffix in TEXT_FILES):
        text = file.read_text(encoding="utf-8", errors="replace")
        for place in sorted(private):
            if place in text:
                message = f"private: {file.relative_to(directory)} names {place}"
                raise PackageError(
                    message,
                    where="package",
                    hint="remove it there, or move the file it comes from; nothing was written",
                )
