"""The names of checkpoints: `runs/a@400`, `runs/a@best`, a directory, a Hub id, a file in a package.

Every command and `base.checkpoint` of every recipe read refs here, so they mean the same everywhere.
"""

import difflib
import itertools
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from finetune.errors import CheckpointError, RunError
from finetune.plan.retention import Saved
from finetune.recipe.addresses import is_place
from finetune.recipe.schema import Best
from finetune.store.checkpoints import best
from finetune.store.checkpoints.manifest import MANIFEST, Checkpoint, read
from finetune.store.checkpoints.store import Store
from finetune.store.hub import HUB_ID
from finetune.store.mirror import replica
from finetune.store.rank import is_first
from finetune.store.run import journal, scan
from finetune.store.run.directory import PLAN, RunDirectory

_RUN = re.compile(r"(?P<run>.+)@(?P<step>\d{1,8}|last|best)")
_HUB = re.compile(rf"(?P<repo>{HUB_ID.pattern})(@(?P<revision>[\w./-]+))?")
_HUB_FILE = re.compile(rf"(?P<repo>{HUB_ID.pattern})/(?P<file>[\w./-]+\.gguf)(@(?P<revision>[\w./-]+))?")
_PACKAGE = re.compile(r"package:(?P<name>\w+(\.\w+)*)/(?P<file>.+\.gguf)")
MOST_FOLDERS = 2000  # that a typing error is looked for among
_FORMS = "name RUN@STEP, RUN@last, RUN@best, a directory, a Hub id OWNER/NAME, or a GGUF file: FILE.gguf, OWNER/NAME/FILE.gguf, package:NAME/FILE.gguf"


@dataclass(frozen=True)
class StepRef:
    text: str
    run: Path
    step: int | Literal["last", "best"]
    is_implied: bool = False
    """The text was a bare run, taken as @last."""
    kind: Literal["run"] = "run"


@dataclass(frozen=True)
class OriginRef:
    """RUN@0, a run's own base."""

    text: str
    run: Path
    step: int = 0
    kind: Literal["base"] = "base"


@dataclass(frozen=True)
class CheckpointRef:
    text: str
    path: Path
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True)
class ModelRef:
    text: str
    path: Path
    kind: Literal["model"] = "model"


@dataclass(frozen=True)
class HubRef:
    text: str
    repo: str
    revision: str | None = None
    file: str | None = None
    """A GGUF file in the repository; None is the model that the repository is."""
    kind: Literal["hub"] = "hub"


@dataclass(frozen=True)
class FileRef:
    text: str
    path: Path
    """A GGUF file."""
    kind: Literal["file"] = "file"


@dataclass(frozen=True)
class PackageRef:
    text: str
    repo: str
    """The Python package."""
    path: Path
    """The file inside it."""
    kind: Literal["package"] = "package"


Ref = StepRef | OriginRef | CheckpointRef | ModelRef | HubRef | FileRef | PackageRef


def parse(text: str) -> Ref:
    """Parses a ref. Existing directories and GGUF files come first, then RUN@STEP, then Hub ids.

    A RUN may be the address of a mirror, like `s3://bucket/prefix`: the ref is then one of a run in the cache, as the mirror is now.
    """
    if is_place(text):
        return _of_mirror(text)
    if Path(text).is_dir():
        return _directory(text)
    if text.endswith(".gguf") and Path(text).is_file():
        return FileRef(text, Path(text))
    if match := _RUN.fullmatch(text):
        run, step = Path(match["run"]), match["step"]
        if step in ("last", "best"):
            return StepRef(text, run, "last" if step == "last" else "best")
        return StepRef(text, run, int(step)) if int(step) else OriginRef(text, run)
    if match := _PACKAGE.fullmatch(text):
        return PackageRef(text, match["name"], Path(match["file"]))
    if match := _HUB.fullmatch(text):
        return HubRef(text, match["repo"], match["revision"])
    if (match := _HUB_FILE.fullmatch(text)) and ".." not in match["file"]:
        return HubRef(text, match["repo"], match["revision"], match["file"])
    near = nearest_folder(text)
    hint = f"did you mean `{near}`?" if near else _FORMS
    raise CheckpointError(f"`{text}` is neither a directory nor a ref", hint=hint)


def _of_mirror(text: str) -> Ref:
    match = _RUN.fullmatch(text)
    place, step = (match["run"], match["step"]) if match else (text, None)
    run = replica.run_of(place.rstrip("/"))
    return replace(parse(f"{run}@{step}" if step else str(run)), text=text)


def nearest_folder(text: str) -> str | None:
    """The folder here with the path most like a text; None if none is alike."""
    path = Path(text)
    parents = [path.parent] if path.parent.is_dir() else []
    if path.parent.parent.is_dir():
        beside = list(map(str, _folders(path.parent.parent)))
        parents += map(Path, difflib.get_close_matches(str(path.parent), beside, n=3))
    names = [str(folder) for parent in parents for folder in _folders(parent)]
    return next(iter(difflib.get_close_matches(str(path), names, n=1, cutoff=0.75)), None)


def _folders(directory: Path) -> list[Path]:
    try:
        return [path for path in itertools.islice(directory.iterdir(), MOST_FOLDERS) if path.is_dir()]
    except PermissionError:
        return []


def _directory(text: str) -> Ref:
    path = Path(text)
    if (path / MANIFEST).exists():
        return CheckpointRef(text, path)
    if RunDirectory(path).is_run:
        return StepRef(text, path, "last", is_implied=True)
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return ModelRef(text, path)
    message = f"is no run, checkpoint or model: it has no {PLAN}, {MANIFEST}, config.json or adapter_config.json"
    raise CheckpointError(message, where=text, hint=_FORMS)


def run_around(checkpoint: Path) -> Path | None:
    """The run directory around a checkpoint, if there is one."""
    run = checkpoint.absolute().parents[1]
    return run if RunDirectory(run).is_run else None


def run_of(ref: Ref) -> Path | None:
    """The run directory that a ref leads to, if any: its own, or the one a checkpoint directory lies in."""
    if ref.kind == "run" or ref.kind == "base":
        return ref.run
    return run_around(ref.path) if ref.kind == "checkpoint" else None


def find(ref: Ref) -> Checkpoint:
    """The committed checkpoint of a ref of the kind `run` or `checkpoint`; its manifest is sound, its bytes are not verified. Of a mirror,
    its files are fetched."""
    return replica.completed(described(ref))


def described(ref: Ref) -> Checkpoint:
    """The same; of a mirror, it may have nothing but its manifest."""
    if ref.kind == "checkpoint":
        return read(ref.path)
    if ref.kind != "run":
        raise CheckpointError(f"`{ref.text}` is not a checkpoint of a run", hint="name RUN@STEP, RUN@last or RUN@best")
    if not ref.run.is_dir():
        raise CheckpointError(
            f"there is no run `{ref.run}`", hint="check the path; runs are made by `finetune train --run DIR`"
        )
    store = Store(ref.run)
    if isinstance(ref.step, int):
        return store.find(ref.step)
    committed = {item.step: item for item in store.summaries()}  # all manifests, once: there may be hundreds
    if not committed:
        raise CheckpointError(f"{ref.run} has no checkpoint yet", hint="`finetune train` commits the first one")
    if ref.step == "last":
        return read(committed[max(committed)].path)
    events = scan.events(ref.run)
    evaluated = journal.evaluations(events)
    by = _chosen_by(ref.run)
    saved = [Saved.of(item, evaluated, by) for item in committed.values()]
    notes = best.notes(saved, evaluated, best.first_step(events), by)
    chosen = best.chosen(ref.run, saved, evaluated)
    if chosen is None:
        names, also = ", ".join(map(str, committed)), "".join(f"; {note}" for note in notes)
        raise CheckpointError(
            f"{ref.run} has no evaluated checkpoint; committed: {names}{also}", hint=_to_have_a_best(ref.run)
        )
    for note in notes:
        _say_once(f"warning: {ref.run}: {note}")
    for line in chosen.told:
        _say_once(f"{ref.run}: {line}")
    return read(committed[chosen.step].path)


def _chosen_by(run: Path) -> Best:
    try:
        return RunDirectory(run).plan()[0].recipe.checkpoint.keep.chosen_by
    except RunError:  # without its plan its checkpoints may still be sound
        return Best()


def _to_have_a_best(run: Path) -> str:
    """How to get a best checkpoint."""
    plan = RunDirectory(run).plan()[0] if RunDirectory(run).is_run else None
    if plan and not plan.holdout_counts.examples:
        return "the run has no held-out rows: name a step or `last`, or set `data.holdout` in the recipe of another run"
    return "set `evaluate.every` or `checkpoint.keep.best`, or name a step or `last`"


@cache
def _say_once(line: str) -> None:
    """To stderr; a command may look for the best checkpoint several times."""
    if is_first(os.environ):
        print(line, file=sys.stderr, flush=True)
