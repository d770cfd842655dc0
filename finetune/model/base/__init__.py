"""Pins a base, finds it again, and loads it.

A base is a model on the Hub, in a directory or in a package, or an adapter, merged onto its own base.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blake3
import torch
from transformers import GenerationConfig, PreTrainedModel

from finetune.errors import BaseError, CheckpointError
from finetune.model.base import files, foreign, gguf, hub, load, merge, outline
from finetune.model.base.files import Companions, has_tokenizer, read_ahead, tokenizer_files
from finetune.model.base.foreign import refuse as refuse_foreign
from finetune.model.base.likeness import difference
from finetune.model.base.load import (
    DTYPES,
    STORED_DTYPES,
    Place,
    check_generation_config,
    check_quantization,
    check_weight_files,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    refuse_lacking,
    stop_tokens,
)
from finetune.model.base.located import Look, located
from finetune.model.base.outline import with_dtype
from finetune.plan.plan import PinnedBase
from finetune.recipe.schema import Base
from finetune.store import cache, places
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.checkpoints.refs import Ref, find, nearest_folder, parse, run_around
from finetune.store.checkpoints.verify import verify
from finetune.store.run.directory import RunDirectory

__all__ = [
    "DTYPES",
    "STORED_DTYPES",
    "Companions",
    "Place",
    "attach",
    "beneath",
    "check_generation_config",
    "check_quantization",
    "check_weight_files",
    "difference",
    "directory",
    "empty_model",
    "has_tokenizer",
    "lacking",
    "load_as_stored",
    "load_config",
    "load_model",
    "load_tokenizer",
    "pin",
    "read_ahead",
    "refuse_damaged",
    "refuse_foreign",
    "refuse_lacking",
    "run_around",
    "small_files_of",
    "stop_tokens",
    "tokenizer_directory",
    "tokenizer_files",
    "with_dtype",
]
Settings = tuple[torch.dtype, str | None, str | None, torch.dtype, Place | None]
"""What `load_model` is told of how a model is made, in its order."""
MERGING = 1  # of `_write_merged`; part of the cache key


def pin(base: Base) -> PinnedBase:
    """What exactly the base is: the commit of a Hub id, a digest over the files of a local one; of an adapter, what is beneath too."""
    try:
        pinned, adapter = _pin_itself(base)
    except PermissionError:
        hint = f"let user {os.geteuid()} read it and all that is in it, or train as another one"
        raise BaseError("may not be read", where=base.checkpoint, hint=hint) from None
    if adapter is None:
        return pinned
    merge.check_weights(adapter, base.checkpoint)
    _, below = beneath(adapter, base.checkpoint)
    return PinnedBase(kind="adapter", revision=pinned.revision, digest=files.digest(adapter), beneath=below)


def directory(base: Base, pinned: PinnedBase, with_weights: bool = True) -> Path:
    """A directory that `from_pretrained` reads, downloaded, converted or merged if need be; checked against the pin."""
    base = located(base, pinned, LOOK)
    ref = parse(base.checkpoint)
    if pinned.beneath is not None:
        return _merged(ref, pinned, pinned.beneath, with_weights)
    if ref.kind == "hub":
        patterns = files.FROM_HUB + (files.WEIGHTS if with_weights else ())
        path = hub.download(ref.repo, pinned.revision, patterns)
        if not with_weights and not hub.has_files(ref.repo, pinned.revision, files.WEIGHTS):
            raise BaseError("has no safetensors weights", where=ref.repo, hint=load.CONVERT)
        return path
    if ref.kind == "package":
        return _converted(gguf.find(ref))
    path = _local(ref)
    if not list(path.glob("*.safetensors")) and (known := foreign.describe(path)):
        raise BaseError(known[0], where=ref.text, hint=known[1])
    return path


def beneath(path: Path, where: str) -> tuple[Base, PinnedBase]:
    """The base of an adapter: of one of our runs the run's own, at its pin; else the one that the adapter names, pinned now."""
    below, pinned = _named(path, where)
    if pinned is not None:
        return below, pinned
    if (given := places.bases()) and not places.is_there(below.checkpoint):
        places.say(f"base {below.checkpoint} of {where} is taken from {given[0]}")
        below = Base(checkpoint=given[0])
    with _explained(below, where):
        pinned, adapter = _pin_itself(below)
    if adapter is not None:
        message, hint = f"is an adapter on another adapter, `{below.checkpoint}`", merge.MERGE_YOURSELF
        raise BaseError(message, where=where, hint=hint)
    return below, pinned


def load_as_stored(path: Path, *settings: *Settings) -> PreTrainedModel:
    """As `load_model`; in bf16, what the files store in fp32 beside half precision stays in fp32."""
    model = empty_model(path)
    with outline.keeping(type(model), outline.stored_in_fp32(model, path)):
        return load_model(path, *settings)


def lacking(path: Path) -> dict[str, list[str]]:
    """For `refuse_lacking`, from headers alone."""
    model = empty_model(path)
    found = outline.outline(type(model), model.config, outline.on_meta(outline.headers(path)))
    return {"missing_keys": sorted(found.missing), "mismatched_keys": sorted(found.mismatched)}


def attach(model: PreTrainedModel, path: Path, where: str) -> PreTrainedModel:
    """The model with an adapter on it, not merged and not trainable."""
    with load.quiet():
        return merge.attach(model, path, where)


def tokenizer_directory(adapter: Path, base_directory: Path) -> Path:
    """Where to open the tokenizer of an adapter on a base. What has no config beside it gets the base's, in the cache: by that transformers
    chooses the class, and in training it did."""
    if not files.has_tokenizer(adapter) and not (adapter / files.TEMPLATE).is_file():
        return base_directory
    if files.has_tokenizer(adapter) and (adapter / files.CONFIG).is_file():
        return adapter
    key = blake3.blake3("".join(map(files.small_digest, (base_directory, adapter))).encode()).hexdigest()[:32]

    def build(target: Path) -> None:
        files.copy_small_files(base_directory, adapter, target)
        shutil.copyfile(base_directory / files.CONFIG, target / files.CONFIG)

    return cache.built("tokenizers", key, build)


def small_files_of(checkpoint: Path) -> Path:
    """Config and tokenizer of a checkpoint with all weights, in the cache: keep rules may remove the checkpoint later."""
    key = blake3.blake3(files.small_digest(checkpoint).encode()).hexdigest()[:32]

    def build(target: Path) -> None:
        files.copy_small_files(checkpoint, checkpoint, target)
        shutil.copyfile(checkpoint / files.CONFIG, target / files.CONFIG)

    return cache.built("tokenizers", key, build)


def refuse_damaged(checkpoint: Path) -> None:
    """Reads every byte of a checkpoint of ours; CheckpointError names the first file that is not what was committed."""
    if damages := [damage for damage in verify(checkpoint) if damage.check != "extra"]:
        message = f"{damages[0].file}: {damages[0].message}"
        raise CheckpointError(message, where=str(checkpoint), hint="use another checkpoint of the run")


def _pin_itself(base: Base) -> tuple[PinnedBase, Path | None]:
    """The pin of a base whatever is beneath it, and its directory if it is an adapter."""
    refuse_foreign(base.checkpoint)
    ref = parse(base.checkpoint)
    if ref.kind == "hub":
        with _nearest_named(base.checkpoint):
            commit = hub.commit_of(ref.repo, base.revision or ref.revision)
        is_adapter = merge.is_adapter(hub.download(ref.repo, commit, (merge.CONFIG, "config.json")))
        return PinnedBase(kind="hub", revision=commit, digest=None), _adapter(ref, commit) if is_adapter else None
    if base.revision is not None:
        raise BaseError("`base.revision` goes with a Hub checkpoint only", where=base.checkpoint, hint="remove it")
    if ref.kind == "package":  # the file, not what some version of transformers makes of it
        return PinnedBase(kind="package", revision=None, digest=f"blake3:{files.file_digest(gguf.find(ref))}"), None
    path = _local(ref)
    if (path / MANIFEST).exists():
        refuse_damaged(path)
    pinned = PinnedBase(kind="directory", revision=None, digest=files.digest(path))
    return pinned, path if merge.is_adapter(path) else None


@contextmanager
def _nearest_named(text: str) -> Iterator[None]:
    """An error of the Hub about what is likely the name of a folder, with a letter wrong."""
    try:
        yield
    except BaseError as error:
        if near := nearest_folder(text):
            message = f"is no folder here, and as a Hub id: {error.message}"
            raise BaseError(message, where=text, hint=f"did you mean the folder `{near}`?") from None
        raise


def _local(ref: Ref) -> Path:
    """The directory of a base that is neither on the Hub nor in a package."""
    path = _path_here(ref)
    if path is None or not path.is_dir():
        raise BaseError("is not there", where=ref.text, hint="name a directory, a Hub id, or package:NAME/file.gguf")
    return path


def _path_here(ref: Ref) -> Path | None:
    """Where a ref to a directory leads; None for what is not one."""
    if ref.kind == "run":
        return find(ref).path
    return ref.path if ref.kind == "checkpoint" or ref.kind == "model" else None


def _check_digest(ref: Ref, digest: str, pinned: PinnedBase) -> None:
    if digest != pinned.digest:
        raise BaseError(
            "is not what it was when the run was planned", where=ref.text, hint="restore it, or start a new run"
        )


def _converted(file: Path) -> Path:
    """A GGUF file as safetensors: converted once, kept in the cache by the file's digest."""

    def convert(target: Path) -> None:
        print(f"converting {file.name} to safetensors, once (about 20 seconds)", file=sys.stderr, flush=True)
        with load.quiet():
            gguf.convert(file, target)

    return cache.built("converted", f"{files.file_digest(file)[:32]}-{gguf.CONVERSION}", convert)


def _place(ref: Ref) -> Path | None:
    """The directory or the file that a ref leads to, if it does; a Hub checkpoint whole, as it is now."""
    if ref.kind == "package":
        return gguf.find(ref)
    if ref.kind == "hub":
        return hub.download(ref.repo, hub.commit_of(ref.repo, ref.revision), files.FROM_HUB + files.WEIGHTS)
    return _path_here(ref)


LOOK = Look(
    place_of=_place,
    digest_of=lambda place: files.digest(place) if place.is_dir() else f"blake3:{files.file_digest(place)}",
    commit_of=lambda ref: hub.commit_of(ref.repo, ref.revision),
)


def _adapter(ref: Ref, commit: str | None) -> Path:
    """The directory of an adapter, whole."""
    if ref.kind == "hub":
        return hub.download(ref.repo, commit, files.FROM_HUB + files.WEIGHTS)
    return _local(ref)


def _named(path: Path, where: str) -> tuple[Base, PinnedBase | None]:
    """What an adapter says it lies on, with the pin if it is the base of a run of ours."""
    is_ours = (path / MANIFEST).exists()
    if is_ours and (run := run_around(path)):
        plan, _ = RunDirectory(run).plan()
        return plan.recipe.base, plan.base
    config = merge.read_config(path, where)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if is_ours and not revision:  # it names what only its run can find
        raise CheckpointError("is an adapter whose run directory is not around it", where=where)
    if not name:
        message, hint = (
            "is an adapter that does not name its base",
            f"set base_model_name_or_path in its {merge.CONFIG}",
        )
        raise BaseError(message, where=where, hint=hint)
    return Base(checkpoint=name, revision=None if Path(name).is_dir() else revision), None


@contextmanager
def _explained(below: Base, where: str) -> Iterator[None]:
    """An error of the base beneath says which adapter wanted it."""
    try:
        yield
    except (BaseError, CheckpointError) as error:
        message = f"is an adapter, and its base cannot be had: {error}".partition("\nhint: ")[0]
        hint = (
            f"set base_model_name_or_path in its {merge.CONFIG} to the Hub id or the directory of `{below.checkpoint}`"
        )
        raise BaseError(message, where=where, hint=hint) from None


def _merged(ref: Ref, pinned: PinnedBase, pinned_below: PinnedBase, with_weights: bool) -> Path:
    """An adapter merged onto what is beneath it, in fp32: done once, kept in the cache by the pins of both.

    Once it is there, the base beneath is not needed. Without weights, a directory with config and tokenizer alone.
    """
    path = _adapter(ref, pinned.revision)
    _check_digest(ref, files.digest(path), pinned)

    def build(target: Path) -> None:
        below, _ = _named(path, ref.text)
        with _explained(below, ref.text):
            source = directory(below, pinned_below, with_weights)
        if with_weights:
            print(f"merging {ref.text} onto {below.checkpoint}, once", file=sys.stderr, flush=True)
        model = load_model(source) if with_weights else empty_model(source)
        with load.quiet():
            model = merge.merge(model, path, ref.text)
        _write_merged(model, source, path, target, ref.text)

    facts = json.dumps(pinned.model_dump(exclude_defaults=True), sort_keys=True)
    key = f"{blake3.blake3(facts.encode()).hexdigest()[:32]}-{MERGING}"
    return cache.built("merged" if with_weights else "merged-configs", key, build)


def _write_merged(model: PreTrainedModel, source: Path, adapter: Path, target: Path, where: str) -> None:
    """Weights unless they are on the meta device, the small files, and the base's own config with what the adapter changed."""
    config = load.read_json(source / "config.json")
    section = config if "vocab_size" in config else config.get("text_config", config)
    rows = model.config.get_text_config().vocab_size
    has_own_vocabulary = rows != section.get("vocab_size", rows)
    if not files.has_tokenizer(adapter) and (has_own_vocabulary or not files.has_tokenizer(source)):
        raise load.no_tokenizer(where, adapter)
    if has_own_vocabulary:
        section["vocab_size"] = rows
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    if model.device.type != "meta":
        # The base's own may be one that refuses to be saved; its file is copied below.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        with load.quiet():
            model.save_pretrained(target)
        (target / "generation_config.json").unlink()
    files.copy_small_files(source, adapter, target)
    (target / "config.json").write_text(json.dumps(with_dtype(config, torch.float32), indent=2) + "\n")
