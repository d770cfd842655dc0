"""A checkpoint of a run as a model folder for plain transformers (or peft): a proven package, or none.

Everything is written beside the target, loaded back in a fresh process, compared with the trained model, synced, and renamed last.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.heldout import lineage
from finetune.errors import BaseError, CheckpointError, DataError, FinetuneError, PackageError
from finetune.model import base
from finetune.package import probe, proof, reference, weights
from finetune.package.assembly import assemble
from finetune.package.attest import bom, licence, provenance, signing
from finetune.package.card import figures, record
from finetune.package.card.card import card
from finetune.package.card.facts import CheckReport, Facts, hub_base
from finetune.package.proof import Check
from finetune.package.verify.contents import CARD, files_of, sha256
from finetune.package.verify.verify import folder_findings
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan, Stage
from finetune.plan.split import Seen
from finetune.recipe.load import to_yaml
from finetune.store.beside import staged
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.refs import find, parse
from finetune.store.durable import failures, rename, sync_tree
from finetune.store.run import scan
from finetune.store.run.directory import JOURNAL, RECIPE, RunDirectory
from finetune.training.opened import Opened, open_model, open_tokenizer, run_of
from finetune.training.resolve import resolve_own

TEXT_FILES = {".json", ".jsonl", ".jinja", ".yaml", ".md", ".txt"}


@dataclass(frozen=True)
class Average:
    """Further checkpoints in the mean of the weights."""

    steps: Sequence[int]
    evaluate: Callable[[PreTrainedModel, Path], Metrics]
    """Held-out figures of a model on the rows of a run, empty if none are held out: a mean is never packaged unevaluated."""


class PackagedFile(TypedDict):
    name: str
    bytes: int
    digest: str


class Packaged(TypedDict):
    """What `package --json` prints."""

    path: str
    files: list[PackagedFile]
    checks: list[CheckReport]


def package(
    ref: str,
    directory: Path,
    key: Path | None = None,
    average: Average | None = None,
    load: proof.Loader | None = None,
    dtype: str | None = None,
) -> Packaged:
    """Writes a checkpoint, or the mean of several, as a package, signed if you name a private key; returns {path, files: [{name, bytes, digest}], checks:
    [{name, message, …}]}.
    `dtype` takes the place of the recipe's `package.dtype`, also in the packaged recipe. `load` loads it back, by default in a fresh
    process (`proof.load_here`: many packages in one warm process).

    Raises PackageError with the name of the failed check; then no folder is left.
    """
    run = _run_of(ref)
    _refuse_existing(directory)
    opened = open_model(ref, is_as_trained=False)
    opened = _with_dtype(opened, dtype) if dtype else opened
    plan, manifest = opened.run_plan, opened.run_checkpoint.manifest
    recipe = plan.recipe
    _refuse_unnamed_base(plan, recipe.package.form)
    try:
        tokenizer = open_tokenizer(opened)
    except DataError as error:
        raise PackageError(f"encoding: {error.message}", where=ref, hint=error.hint) from None
    checks = [Check("checkpoint", f"every byte of step {manifest.step} is as it was committed")]
    if recipe.base.quantization:
        quantized = open_model(ref).model
        checks.append(weights.unquantized(probe.logits(quantized, tokenizer), probe.logits(opened.model, tokenizer)))
        del quantized
    base_directory = _base_directory(plan)
    stated = licence.of_base(recipe.base, base_directory)
    licences = (
        licence.of_package(recipe.package, stated),
        stated["license"] if stated else None,
        tuple(map(licence.of_data, recipe.data.train, plan.train)),
    )
    numbers, model = record.figures(scan.read(run), manifest.step), opened.model
    averaged: list[Manifest] = []
    if average:
        model, averaged, changes = _averaged(run, opened, tokenizer, average)
        numbers.append(record.of_average([*averaged, manifest], average.evaluate(model, run)))
        checks += changes
    with _staged(directory) as staging:
        made = assemble(replace(opened, model=model), tokenizer, base_directory, staging, load or proof.load_back)
        checks += made.checks
        checks.append(Check("private", "no file names a folder of the machine it was made on"))
        found = [check.report for check in checks]
        named = recipe.package.dtype or recipe.train.precision
        facts = Facts(
            plan,
            manifest,
            numbers,
            found,
            recipe.package.form,
            named,
            *licences,
            averaged,
            _stages(manifest, ref),
            _seen(plan, ref),
        )
        _write_record(facts, staging)
        (staging / reference.FILE).write_text(json.dumps(made.record) + "\n", encoding="utf-8")
        _write_bom(facts, made.model.config.architectures, staging)
        statement = provenance.statement(facts, files_of(staging), RunDirectory(run).plan()[1].get("software", {}))
        (staging / provenance.FILE).write_text(provenance.to_line(statement), encoding="utf-8")
        if key:
            signing.sign(staging, key)
        _refuse_wrong(staging)
        refuse_private(staging, [run, opened.base_directory, directory])
        files = _files(staging)
    return {"path": str(directory), "files": files, "checks": found}


def _stages(manifest: Manifest, ref: str) -> tuple[Stage, ...]:
    """The runs behind the weights. This run is named by its id, so a package does not depend on the directory's name."""
    stages = lineage.stages(ref)
    if manifest.step == 0:  # only its base
        return stages
    return (stages[0].model_copy(update={"ref": f"{manifest.run}@{manifest.step}"}), *stages[1:])


def _seen(plan: Plan, ref: str) -> tuple[Seen, ...]:
    """Held-out rows that were trained on: from the plan, or counted now for a run of an older version."""
    if plan.stages is not None or plan.holdout_counts.rows == 0:
        return plan.seen
    try:
        resolved = resolve_own(plan, ref)
    except FinetuneError as error:  # its rows are gone, and that is no reason to refuse the package
        return (Seen(by=lineage.THIS_RUN, rows=None, why=error.message),)
    return resolved.held_out.seen_by(lineage.stages(ref)).seen


def _with_dtype(opened: Opened, dtype: str) -> Opened:
    plan = opened.run_plan
    recipe = plan.recipe
    changed = recipe.model_copy(update={"package": recipe.package.model_copy(update={"dtype": dtype})})
    return replace(opened, plan=plan.model_copy(update={"recipe": changed}))


def checkpoint_of(ref: str) -> tuple[Path, int]:
    """The run and the step of a ref. Raises PackageError if it is no checkpoint of a run."""
    return _run_of(ref), find(parse(ref)).step


def _averaged(
    run: Path, opened: Opened, tokenizer: PreTrainedTokenizerBase, average: Average
) -> tuple[PreTrainedModel, list[Manifest], list[Check]]:
    if opened.run_plan.recipe.package.form == "adapter":
        message = "the mean of adapters is no adapter: the product of two means is not the mean of products"
        raise PackageError(message, where="package.form", hint="average with `package.form: merged`")
    others = sorted(set(average.steps) - {opened.run_checkpoint.step})
    if not others:
        raise PackageError("there is nothing to average with", where="--average", hint="name other steps of the run")
    return weights.mean([f"{run}@{step}" for step in others], opened, tokenizer)


def _refuse_wrong(directory: Path) -> None:
    """Runs the checks of `verify` on the folder before it is a package."""
    for check, file, tensor, message in folder_findings(directory)[1]:
        told = ": ".join(filter(None, (file, tensor, message)))
        raise PackageError(f"{check}: {told}", where="package", hint="fix its cause; nothing was written")


def _run_of(ref: str) -> Path:
    """The run directory around a checkpoint; a package needs its plan and journal."""
    parsed = parse(ref)
    run = run_of(parsed) if parsed.kind == "run" or parsed.kind == "checkpoint" else None
    if run is None:
        what = "is no folder that is here, and" if parsed.kind == "hub" else "is"
        hint = "name RUN@STEP, RUN@last, RUN@best or a checkpoint in a run"
        raise PackageError(f"{what} not a checkpoint of a run", where=ref, hint=hint)
    return run


def _refuse_existing(directory: Path) -> None:
    with failures(directory, PackageError, what="cannot be read"):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise PackageError(
                "is there already", where=str(directory), hint="name a new directory, or remove this one"
            )


def _refuse_unnamed_base(plan: Plan, form: str) -> None:
    if form == "adapter" and hub_base(plan) is None:
        raise PackageError(
            "an adapter of a local base would name a base that others do not have",
            where="package.form",
            hint="set base.origin to the Hub checkpoint it is equal to, or use `merged`",
        )


def _base_directory(plan: Plan) -> Path | None:
    """The files of the base's authors, without weights if these are unavailable. None if the base of a full fine-tune is gone: the
    card then says that the licence is unknown, and `proof` finds missing untrained weights."""
    for has_weights in (True, False):
        with suppress(BaseError, CheckpointError):
            return base.directory(plan.recipe.base, plan.base, has_weights)
    return None


def _write_record(facts: Facts, directory: Path) -> None:
    training = directory / "training"
    training.mkdir()
    (training / RECIPE).write_text(record.recipe(facts.plan), encoding="utf-8")
    (training / JOURNAL).write_text(record.to_lines(facts.figures), encoding="utf-8")
    (training / "loss.png").write_bytes(record.loss_curve(facts.figures))
    (directory / CARD).write_text(card(facts), encoding="utf-8")
    if entries := figures.eval_results(facts.figures, facts.manifest.step, facts.plan):
        (directory / ".eval_results").mkdir()
        (directory / ".eval_results/held-out.yaml").write_text(to_yaml(entries), encoding="utf-8")


def _write_bom(facts: Facts, architectures: list[str] | None, directory: Path) -> None:
    files = {name: path for name, path in files_of(directory).items() if name != CARD}
    name = facts.plan.recipe.publish.repo if facts.plan.recipe.publish else facts.plan.plan_id
    value = bom.bom(facts, name, (architectures or ["unknown"])[0], files)
    (directory / bom.FILE).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


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


def _files(directory: Path) -> list[PackagedFile]:
    """The files of the package, with the digests that the Hub also uses."""
    files = files_of(directory)
    return [
        {"name": name, "bytes": path.stat().st_size, "digest": f"sha256:{sha256(path)}"} for name, path in files.items()
    ]


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A directory beside the target: on success it is synced and becomes the target, otherwise it is removed."""
    try:
        with failures(directory, PackageError), staged(directory) as staging:
            yield staging
            _share(staging)
            sync_tree(staging)
            rename(staging, directory)
    except SafetensorError as error:  # safetensors reports a full disk like this
        raise PackageError(
            f"cannot write weights: {error}", where=str(directory), hint="look at the free space of this disk"
        ) from error


def _share(directory: Path) -> None:
    """Gives files the mode of the folder: safetensors writes 0600, whatever the umask."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if not path.is_dir():
            path.chmod(mode)
