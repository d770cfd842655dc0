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
from finetune.package import documents, probe, proof, reference, refusals, weights
from finetune.package.assembly import assemble
from finetune.package.attest import licence, signing
from finetune.package.card import record
from finetune.package.card.facts import CheckReport, Facts, lies_on
from finetune.package.card.metadata import FrontMatter
from finetune.package.card.reported import Reported
from finetune.package.proof import Check
from finetune.package.verify.contents import files_of, sha256
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan, Stage
from finetune.plan.split import Seen
from finetune.store.beside import staged
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.refs import find, parse
from finetune.store.durable import failures, rename, sync_tree
from finetune.store.run import scan
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import Opened, open_model, open_tokenizer
from finetune.training.resolve import resolve_own


@dataclass(frozen=True)
class Average:
    """Further checkpoints in the mean of the weights."""

    steps: Sequence[int]
    evaluate: Callable[[PreTrainedModel, Path], Metrics]
    """Held-out figures of a model on the rows of a run, empty if none are held out: a mean is never packaged unevaluated."""


Report = Callable[[str, PreTrainedModel | None], Reported | None]
"""Evaluates a ref, or a mean that is not stored, on the test set; None where its recipe names none."""


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
    report: Report | None = None,
) -> Packaged:
    """Writes a checkpoint, or the mean of several, as a package, signed if you name a private key; returns {path, files: [{name, bytes, digest}], checks:
    [{name, message, …}]}.
    `dtype` takes the place of the recipe's `package.dtype`, also in the packaged recipe. `load` loads it back, by default in a fresh
    process (`proof.load_here`: many packages in one warm process). Without `report` the card has the figures of the held-out rows.

    Raises PackageError with the name of the failed check; then no folder is left.
    """
    run = refusals.run_of_ref(ref)
    refusals.refuse_existing(directory)
    asked = RunDirectory(run).plan()[0]
    refusals.refuse_unnamed_base(asked, asked.recipe.package.form)
    # Before the weights are opened here: they are then in memory once.
    reported = report(ref, None) if report and not average else None
    opened = _with_dtype(open_model(ref, is_as_trained=False), dtype)
    plan, manifest = opened.run_plan, opened.run_checkpoint.manifest
    recipe = plan.recipe
    if manifest.kind == "average":
        refusals.refuse_average(ref, opened, is_averaged_again=average is not None)
    tokenizer = _tokenizer_of(opened, ref)
    checks = [Check("checkpoint", f"every byte of step {manifest.step} is as it was committed")]
    checks += _of_base(ref, opened, tokenizer)
    base_directory = _base_directory(plan)
    licences = _licences(plan, base_directory)
    numbers, model = record.of_checkpoint(scan.read(run), manifest), opened.model
    averaged: list[Manifest] = []
    if average:
        model, averaged, changes = _averaged(run, opened, tokenizer, average)
        numbers.append(record.of_average([*averaged, manifest], average.evaluate(model, run)))
        checks += changes
        reported = report(ref, model) if report else None
    numbers += reported.records(plan, manifest.step) if reported else []
    with _staged(directory) as staging:
        made = assemble(replace(opened, model=model), tokenizer, base_directory, staging, load or proof.load_back)
        checks += [*made.checks, Check("private", "no file names a folder of the machine it was made on")]
        found = [check.report for check in checks]
        form, dtype = recipe.package.form, recipe.package.dtype or recipe.train.precision
        stages, seen = _stages(manifest, ref), reported.seen if reported else _seen(plan, manifest, ref)
        facts = Facts(plan, manifest, numbers, found, form, dtype, *licences, averaged, stages, seen, reported)
        documents.write_record(facts, staging)
        (staging / reference.FILE).write_text(json.dumps(made.record) + "\n", encoding="utf-8")
        documents.write_attestations(facts, made.model.config.architectures, run, staging)
        if key:
            signing.sign(staging, key)
        refusals.refuse_wrong(staging)
        refusals.refuse_private(staging, [run, opened.base_directory, directory])
        files = _files(staging)
    return {"path": str(directory), "files": files, "checks": found}


def _tokenizer_of(opened: Opened, ref: str) -> PreTrainedTokenizerBase:
    try:
        return open_tokenizer(opened)
    except DataError as error:
        raise PackageError(f"encoding: {error.message}", where=ref, hint=error.hint) from None


def _of_base(ref: str, opened: Opened, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """Where the weights under the package are not the base's files, or not those of the training."""
    if under := lies_on(opened.run_plan):
        yield Check("base", f"it lies on {under}")
    if opened.run_plan.quantization:
        trained = probe.logits(open_model(ref).model, tokenizer)
        is_stored = opened.run_plan.base.stored is not None
        plain = "the numbers that the base's files stand for" if is_stored else "the base itself"
        yield weights.unquantized(trained, probe.logits(opened.model, tokenizer), plain)


def _licences(plan: Plan, base_directory: Path | None) -> tuple[FrontMatter | None, str | None, tuple[str | None, ...]]:
    """Of the package, of its base, and of each source of training rows."""
    recipe = plan.recipe
    stated = licence.of_base(recipe.base, base_directory)
    of_package = licence.of_package(recipe.package, stated)
    of_data = tuple(map(licence.of_data, recipe.data.train, plan.train))
    return of_package, stated["license"] if stated else None, of_data


def _stages(manifest: Manifest, ref: str) -> tuple[Stage, ...]:
    """The runs behind the weights. This run is named by its id, so a package does not depend on the directory's name."""
    stages = lineage.stages(ref)
    if manifest.step == 0:  # only its base
        return stages
    return (stages[0].model_copy(update={"ref": f"{manifest.run}@{manifest.step}"}), *stages[1:])


def _seen(plan: Plan, manifest: Manifest, ref: str) -> tuple[Seen, ...]:
    """Held-out rows that were trained on: from the plan, or counted now for a run of an older version, and for an average, which may
    have members of other runs."""
    is_known = plan.stages is not None and manifest.kind != "average"
    if is_known or plan.holdout_counts.rows == 0:
        return plan.seen
    try:
        resolved = resolve_own(plan, ref)
    except FinetuneError as error:  # its rows are gone, and that is no reason to refuse the package
        return (Seen(by=lineage.THIS_RUN, rows=None, why=error.message),)
    return resolved.held_out.seen_by(lineage.stages(ref)).seen


def _with_dtype(opened: Opened, dtype: str | None) -> Opened:
    if dtype is None:
        return opened
    plan = opened.run_plan
    recipe = plan.recipe
    changed = recipe.model_copy(update={"package": recipe.package.model_copy(update={"dtype": dtype})})
    return replace(opened, plan=plan.model_copy(update={"recipe": changed}))


def checkpoint_of(ref: str) -> tuple[Path, int]:
    """The run and the step of a ref. Raises PackageError if it is no checkpoint of a run."""
    return refusals.run_of_ref(ref), find(parse(ref)).step


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


def _base_directory(plan: Plan) -> Path | None:
    """The files of the base's authors, without weights if these are unavailable. None if the base of a full fine-tune is gone: the
    card then says that the licence is unknown, and `proof` finds missing untrained weights."""
    for has_weights in (True, False):
        with suppress(BaseError, CheckpointError):
            return base.directory(plan.recipe.base, plan.base, has_weights)
    return None


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
