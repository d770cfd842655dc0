"""Proves that a folder is the trained model: loads it back in a fresh process and compares.

A passed check is a `Check` with its figures; a failed one raises a PackageError with its name.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import xxhash
from safetensors.torch import load_file

from finetune.errors import PackageError, counted
from finetune.model.base import outline
from finetune.model.base.quiet import quiet
from finetune.package import probe
from finetune.package.card.facts import CheckReport
from finetune.store.tensors import Place, read_header

# Of the largest logit: the class of a model with images may also take sums in another order.
CLASS_TOLERANCE = 1e-3
Logits = dict[str, torch.Tensor]
NOT_FOR_THE_PROBE = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the probe needs no network, so no secret


@dataclass(frozen=True)
class Check:
    """A passed check of a package."""

    name: str
    message: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def report(self) -> CheckReport:
        return cast(CheckReport, {"name": self.name, "message": self.message, **self.figures})


@dataclass(frozen=True)
class Look:
    """The output of `probe` for a model."""

    logits: Logits
    facts: probe.Facts
    """As read from JSON."""


@dataclass(frozen=True)
class LoadedLook:
    """The same of a package that was loaded."""

    logits: Logits
    facts: probe.LoadedFacts


# A package, the base that it is an adapter of, and the trained class unless that is a causal LM -> a look at it
Loader = Callable[..., LoadedLook]


def load_back(directory: Path, base: Path | None, trained: str | None = None) -> LoadedLook:
    """Probes a package in a fresh process that shares nothing with this one."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_PROBE}
    with tempfile.TemporaryDirectory() as out:
        # -P: otherwise the program's own folder comes first on the import path
        command = [
            sys.executable,
            "-P",
            probe.__file__,
            str(directory),
            out,
            str(torch.get_num_threads()),
            str(base or ""),
            trained or "",
        ]
        result = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}"
            raise failed("load", f"cannot be loaded in a fresh process: {reason}")
        return LoadedLook(load_file(Path(out, "logits.safetensors")), json.loads(Path(out, "facts.json").read_bytes()))


def load_here(directory: Path, base: Path | None, trained: str | None = None) -> LoadedLook:
    """The same in this process, for many models in a row: seconds faster, but a warm process might hide a fault."""
    with quiet():
        logits, facts = probe.look(directory, base, trained)
    return LoadedLook(logits, json.loads(json.dumps(facts)))


def equal(
    trained: Look, loaded: LoadedLook, surplus: Mapping[str, Collection[str]], beside: Collection[str] = ()
) -> list[Check]:
    """Checks that the package, loaded in a fresh process, is the trained model: weights, ties, tokenizer, template and logits.

    `surplus` are tensors from the base that a class of models may find in the package and not want; `beside` are those of the
    model beside its text side, which `carried` compares with the base's files.
    """
    _refuse_keys(loaded.facts["keys"], loaded.facts["class"], surplus)
    was, now = trained.facts, loaded.facts
    pairs: tuple[tuple[str, object, object], ...] = (
        ("weights", _without(beside, was["weights"]), _without(beside, now["weights"])),
        ("tied", was["tied"], now["tied"]),
        ("tokenizer", was["tokenizer"], now["tokenizer"]),
        ("template", was["template"], now["template"]),
    )
    for name, one, two in pairs:
        if one != two:
            raise failed(name, _difference(name, one, two))
    size, vocabulary = loaded.facts["tokenizer"]["size"], loaded.facts["vocabulary"]
    if size > vocabulary:
        raise failed("vocabulary", f"the tokenizer has {size:,} tokens, the model only {vocabulary:,}")
    for name, logits in trained.logits.items():
        if not torch.equal(logits, loaded.logits[name]):
            largest = (logits - loaded.logits[name]).abs().max().item()
            raise failed("logits", f"a fresh process computes logits that differ by up to {largest:.3g}")
    tensors, positions = (
        len(_without(beside, loaded.facts["weights"])),
        sum(one.shape[0] * one.shape[1] for one in loaded.logits.values()),
    )
    return [
        *_by_declared_class(loaded.facts["declared"], surplus),
        Check("keys", "no weight is missing, surplus or of another shape"),
        Check(
            "weights",
            f"all {tensors} tensors, loaded in a fresh process, equal the trained ones bit for bit",
            {"tensors": tensors},
        ),
        Check("tied", "tied weights are tied again" if loaded.facts["tied"] else "the model ties no weights"),
        Check("tokenizer", f"{len(probe.TEXTS)} texts become the same tokens", {"tokens": size}),
        Check(
            "template",
            "the chat template is the one that was trained with"
            if loaded.facts["template"]["source"]
            else "no chat template",
        ),
        Check("vocabulary", f"{size:,} tokens fit the model's {vocabulary:,}", {"vocabulary": vocabulary}),
        Check(
            "logits",
            f"a fresh process computes the same logits at {counted(positions, 'position')}, bit for bit",
            {"max_difference": 0.0, "positions": positions},
        ),
    ]


def _without(names: Collection[str], found: Mapping[str, str]) -> dict[str, str]:
    return {name: one for name, one in found.items() if name not in names}


def _by_declared_class(found: probe.Declared | None, surplus: Mapping[str, Collection[str]]) -> list[Check]:
    """Checks that the class of the config, if it is not the trained one, finds all its weights and computes the same."""
    if found is None:
        return []
    _refuse_keys(found["keys"], found["class"], surplus)
    if not found["apart"] <= CLASS_TOLERANCE * max(found["largest"], 1.0):
        raise failed(
            "class", f"{found['class']}, which the config declares, computes logits {found['apart']:.3g} apart"
        )
    message = f"{found['class']}, which the config declares, has all its weights and computes the same of text"
    return [Check("class", message, {"max_difference": found["apart"]})]


def _refuse_keys(keys: Mapping[str, list[str]], name: str, surplus: Mapping[str, Collection[str]]) -> None:
    wrong = [key for kind, names in keys.items() for key in names if kind != "unexpected_keys"]
    wrong += [key for key in keys["unexpected_keys"] if key not in surplus.get(name, ())]
    if wrong:
        message = f"{len(wrong)} weights of {name} are missing, surplus or of another shape: {', '.join(wrong[:3])}"
        raise failed("keys", message)


def stored_as(directory: Path, types: Mapping[str, str], dtype: str) -> Check:
    """Checks that every tensor is in the files once, in its type of `types` (safetensors' spelling); most have `dtype`."""
    places = [item for file in sorted(directory.glob("*.safetensors")) for item in read_header(file).items()]
    names = [name for name, _ in places]
    wrong = [f"{name} is {place.dtype}" for name, place in places if place.dtype != types.get(name)]
    wrong += sorted({name for name in names if names.count(name) > 1}) + sorted(types.keys() - set(names))
    if wrong:
        raise failed("dtype", f"weights must be of their types, each stored once: {', '.join(wrong[:3])}")
    others = [name for name in names if types[name] != dtype]
    message = f"all {len(names)} stored tensors are {dtype}"
    if others:
        message += (
            f", but {len(others)} that the model or its base keeps otherwise, like {others[0]} as {types[others[0]]}"
        )
    return Check("dtype", message, {"tensors": len(names)})


def carried(directory: Path, base: Path, names: Collection[str], files: Collection[str]) -> Check:
    """Checks that untrained tensors and files of the base are in the package, byte for byte."""
    for file in files:
        if (directory / file).read_bytes() != (base / file).read_bytes():
            raise failed("base", f"{file} is not as it is in the base")
    here, there = _places(directory), _places(base)
    for name in names:
        if _digest(*here[name]) != _digest(*there[name]):
            raise failed("base", f"{name} is not as it is in the base")
    what = [f"{len(names)} tensors ({', '.join(parts_of(names))})"] * bool(names) + sorted(files)
    return Check("base", f"not trained, and as in the base to the byte: {', '.join(what)}", {"tensors": len(names)})


def parts_of(names: Collection[str]) -> list[str]:
    """Short prefixes of the names, for a message."""
    return sorted(
        {".".join(name.split(".")[:2]) if name.startswith("model.") else name.split(".")[0] for name in names}
    )


def _places(directory: Path) -> dict[str, tuple[Path, Place]]:
    files = outline.headers_by_file(directory).items()
    return {name: (directory / file, place) for file, places in files for name, place in places.items()}


def _digest(path: Path, place: Place) -> str:
    with path.open("rb") as file:
        file.seek(place.start)
        return xxhash.xxh3_128_hexdigest(file.read(place.end - place.start))


def _difference(name: str, trained: object, loaded: object) -> str:
    if isinstance(trained, dict) and isinstance(loaded, dict):
        changed = [key for key in sorted(trained.keys() | loaded.keys()) if trained.get(key) != loaded.get(key)]
        return f"{len(changed)} of {len(trained)} are not as trained: {', '.join(changed[:3])}"
    return f"{loaded} is not {trained}, as trained"


def failed(check: str, message: str, hint: str = "package it again; if it fails again, report it") -> PackageError:
    return PackageError(f"{check}: {message}", where="package", hint=f"{hint}; nothing was written")
