"""Pins a base, and makes a directory for `from_pretrained` of it: downloads, converts or merges if needed.

A base is a model on the Hub, in a directory or in a package, or an adapter, merged onto its own base.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import blake3
from transformers import PreTrainedModel

from finetune.errors import BaseError, CheckpointError
from finetune.model.base import dequantized, files, foreign, from_nothing, gguf, hub, merge, native, rope
from finetune.model.base.foreign import refuse as refuse_foreign
from finetune.model.base.load import empty_model, load_model
from finetune.model.base.located import Look, located
from finetune.model.base.merged import write_merged
from finetune.model.base.quiet import quiet
from finetune.model.base.weight_files import CONVERT
from finetune.plan.plan import PinnedBase
from finetune.recipe.schema import Base
from finetune.store import cache, places
from finetune.store.checkpoints.manifest import MANIFEST, read
from finetune.store.checkpoints.refs import Ref, find, parse, run_around
from finetune.store.checkpoints.verify import verify
from finetune.store.run.directory import RunDirectory

RESTORE = "restore it, or start a new run"
MERGING = 1  # of `write_merged`; part of the cache key


def pin(base: Base, is_adapted: bool = False) -> PinnedBase:
    """The exact base: the commit of a Hub id, or a digest over local files; for an adapter, its base too. `is_adapted`: it stays
    frozen under a new adapter, whole on each device."""
    try:
        pinned, adapter = _pin_itself(base, is_adapted)
    except PermissionError:
        hint = f"let user {os.geteuid()} read it and all that is in it, or train as another one"
        raise BaseError("may not be read", where=base.checkpoint, hint=hint) from None
    dequantized.refuse_unstored(base, pinned)
    if adapter is None:
        return pinned
    merge.check_weights(adapter, base.checkpoint)
    _, below = beneath(adapter, base.checkpoint)
    return PinnedBase(kind="adapter", revision=pinned.revision, digest=files.digest(adapter), beneath=below)


def directory(base: Base, pinned: PinnedBase, with_weights: bool = True, *, as_trained: bool = False) -> Path:
    """A directory for `from_pretrained`: downloaded, converted, merged or drawn if needed, checked against the pin, without code. Weights
    are numbers, unless they are wanted `as_trained` and the pin says that they stay as they are stored: see `load_model`."""
    path = native.readable(_directory(base, pinned, with_weights, as_trained))
    if base.random_weights is not None:
        path = from_nothing.directory(path, base.random_weights, base.checkpoint, with_weights)
    return rope.scaled(path, base.rope) if base.rope else path


def _directory(base: Base, pinned: PinnedBase, with_weights: bool, as_trained: bool) -> Path:
    is_drawn = base.random_weights is not None
    base = located(base, pinned, replace(LOOK, digest_of=from_nothing.digest) if is_drawn else LOOK)
    ref = parse(base.checkpoint)
    if pinned.beneath is not None:
        return _merged(ref, pinned, pinned.beneath, with_weights)
    if pinned.stored is not None and with_weights and as_trained:
        return dequantized.stored_directory(pinned, native.readable(_as_published(ref, pinned, with_weights)))
    if pinned.dequantized is not None:
        return dequantized.directory(
            pinned, lambda: native.readable(_as_published(ref, pinned, with_weights)), with_weights
        )
    return _as_published(ref, pinned, with_weights, is_drawn)


def _as_published(ref: Ref, pinned: PinnedBase, with_weights: bool, is_drawn: bool = False) -> Path:
    """The directory of a base that is not an adapter; a GGUF file is converted. Weights that are drawn need not be there."""
    if ref.kind == "hub":
        if ref.file:
            return gguf.converted(hub.file(ref.repo, pinned.revision, ref.file))
        patterns = files.FROM_HUB + (files.WEIGHTS if with_weights and not is_drawn else ())
        path = hub.download(ref.repo, pinned.revision, patterns)
        if not with_weights and not is_drawn and not hub.has_files(ref.repo, pinned.revision, files.WEIGHTS):
            raise BaseError("has no safetensors weights", where=ref.repo, hint=CONVERT)
        return path
    if ref.kind in ("package", "file"):
        return gguf.converted(gguf.find(ref))
    path = _local(ref)
    if not is_drawn and not list(path.glob("*.safetensors")) and (known := foreign.describe(path)):
        raise BaseError(known[0], where=ref.text, hint=known[1])
    return path


def beneath(path: Path, where: str) -> tuple[Base, PinnedBase]:
    """The base of an adapter. For a checkpoint of our runs it is the run's base, at its pin; else the adapter names it, and
    it is pinned now."""
    below, pinned = _named(path, where)
    if pinned is not None:
        return below, pinned
    if (given := places.bases()) and not places.is_there(below.checkpoint):
        places.say(f"base {below.checkpoint} of {where} is taken from {given[0]}")
        below = Base(checkpoint=given[0])
    with _explained(below, where):
        pinned, adapter = _pin_itself(below)
    if adapter is not None:
        message = f"is an adapter on another adapter, `{below.checkpoint}`"
        raise BaseError(message, where=where, hint=merge.MERGE_YOURSELF)
    return below, pinned


def refuse_damaged(checkpoint: Path) -> None:
    """Reads every byte of a checkpoint of ours; CheckpointError names the first file that differs from its commit."""
    if damages := [damage for damage in verify(checkpoint) if damage.check != "extra"]:
        message = f"{damages[0].file}: {damages[0].message}"
        raise CheckpointError(message, where=str(checkpoint), hint="use another checkpoint of the run")


def _pin_itself(base: Base, is_adapted: bool = False) -> tuple[PinnedBase, Path | None]:
    """The pin of a base without its own base, and its directory if it is an adapter."""
    refuse_foreign(base.checkpoint)
    ref = parse(base.checkpoint)
    if ref.kind == "hub":
        with hub.nearest_named(base.checkpoint):
            commit = hub.commit_of(ref.repo, base.revision or ref.revision)
        if base.random_weights is not None:
            return from_nothing.pinned(ref, commit), None
        if ref.file:
            return PinnedBase(kind=gguf.KIND, revision=commit, digest=None), None
        path = hub.download(ref.repo, commit, (merge.CONFIG, *dequantized.CONFIGS))
        if merge.is_adapter(path):
            return PinnedBase(kind="hub", revision=commit, digest=None), _adapter(ref, commit)
        kept = dequantized.pinned_as(path, base.quantization, is_adapted)
        return PinnedBase(kind="hub", revision=commit, digest=None, **kept), None
    if base.revision is not None:
        raise BaseError("`base.revision` goes with a Hub checkpoint only", where=base.checkpoint, hint="remove it")
    if base.random_weights is not None:
        return from_nothing.pinned(ref), None
    if ref.kind == "package":  # the file, not what some version of transformers makes of it
        return PinnedBase(kind="package", revision=None, digest=f"blake3:{files.file_digest(gguf.find(ref))}"), None
    if ref.kind == "file":
        return PinnedBase(kind=gguf.KIND, revision=None, digest=f"blake3:{files.file_digest(ref.path)}"), None
    path = _local(ref)
    if (path / MANIFEST).exists():
        refuse_damaged(path)
    if merge.is_adapter(path):
        return PinnedBase(kind="directory", revision=None, digest=files.digest(path)), path
    kept = dequantized.pinned_as(path, base.quantization, is_adapted)
    return PinnedBase(kind="directory", revision=None, digest=files.digest(path), **kept), None


def _local(ref: Ref) -> Path:
    """The directory of a local base, outside the Hub and packages."""
    path = _path_here(ref)
    if path is None or not path.is_dir():
        raise BaseError("is not there", where=ref.text, hint="name a directory, a Hub id, or a GGUF file")
    return path


def _path_here(ref: Ref) -> Path | None:
    """The directory of a ref; None if it is not one."""
    if ref.kind == "run":
        return find(ref).path
    return ref.path if ref.kind == "checkpoint" or ref.kind == "model" else None


def _place(ref: Ref) -> Path | None:
    """The directory or the file of a ref, if it has one; of a Hub checkpoint all files, as they are now."""
    if ref.kind in ("package", "file"):
        return gguf.find(ref)
    if ref.kind == "hub" and ref.file:
        return hub.file(ref.repo, hub.commit_of(ref.repo, ref.revision), ref.file)
    if ref.kind == "hub":
        return hub.download(ref.repo, hub.commit_of(ref.repo, ref.revision), files.FROM_HUB + files.WEIGHTS)
    return _path_here(ref)


LOOK = Look(
    place_of=_place,
    digest_of=lambda place: files.digest(place) if place.is_dir() else f"blake3:{files.file_digest(place)}",
    commit_of=lambda ref: hub.commit_of(ref.repo, ref.revision),
)


def _adapter(ref: Ref, commit: str | None) -> Path:
    """The directory of an adapter, with all its files."""
    if ref.kind == "hub":
        return hub.download(ref.repo, commit, files.FROM_HUB + files.WEIGHTS)
    return _local(ref)


def _named(path: Path, where: str) -> tuple[Base, PinnedBase | None]:
    """The base that an adapter names, with the pin if it is the base of one of our runs."""
    if (is_ours := (path / MANIFEST).exists()) and (run := run_around(path)):
        plan, _ = RunDirectory(run).plan()
        return plan.recipe.base, plan.base
    config = merge.read_config(path, where)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if is_ours and not revision and read(path).manifest.run:  # it names what only its run can find
        if given := places.bases():
            return Base(checkpoint=given[0]), None
        hint = "name its base with --base, or move it into `averages/` of its run"
        raise CheckpointError("is an adapter whose run directory is not around it", where=where, hint=hint)
    if not name:
        hint = f"set base_model_name_or_path in its {merge.CONFIG}"
        raise BaseError("is an adapter that does not name its base", where=where, hint=hint)
    return Base(checkpoint=name, revision=None if Path(name).is_dir() else revision), None


@contextmanager
def _explained(below: Base, where: str) -> Iterator[None]:
    """Names the adapter in an error about its base."""
    try:
        yield
    except (BaseError, CheckpointError) as error:
        message = f"is an adapter, and its base cannot be had: {error}".partition("\nhint: ")[0]
        hint = (
            f"set base_model_name_or_path in its {merge.CONFIG} to the Hub id or the directory of `{below.checkpoint}`"
        )
        raise BaseError(message, where=where, hint=hint) from None


def _merged(ref: Ref, pinned: PinnedBase, pinned_below: PinnedBase, with_weights: bool) -> Path:
    """An adapter merged onto its base, in fp32: done once, kept in the cache by the pins of both. Without weights, config and tokenizer."""
    path = _adapter(ref, pinned.revision)
    if files.digest(path) != pinned.digest:
        raise BaseError("is not what it was when the run was planned", where=ref.text, hint=RESTORE)

    def build(target: Path) -> None:
        below, _ = _named(path, ref.text)
        with _explained(below, ref.text):
            source = directory(below, pinned_below, with_weights)
        if with_weights:
            print(f"merging {ref.text} onto {below.checkpoint}, once", file=sys.stderr, flush=True)
        kind = merge.class_below(path, source, ref.text)
        model = load_model(source, kind=kind) if with_weights else empty_model(source, kind)
        with quiet():
            model = merge.merge(model, path, ref.text)
        write_merged(model, source, native.readable(path, source), target, ref.text)

    facts = json.dumps(pinned.model_dump(exclude_defaults=True), sort_keys=True)
    key = f"{blake3.blake3(facts.encode()).hexdigest()[:32]}-{MERGING}"
    return cache.built("merged" if with_weights else "merged-configs", key, build)


def attach(model: PreTrainedModel, path: Path, where: str) -> PreTrainedModel:
    """The model with an adapter on it, not merged and not trainable."""
    with quiet():
        return merge.attach(model, path, where)
