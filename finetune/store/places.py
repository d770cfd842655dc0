"""Where to look for a run's base and data when they are not where the run was planned.

First the user's places (`--base`, `--data OLD=NEW`), then those of an earlier resume, then the folders above the run. A place
counts only if it has the recorded content: the caller must compare.
"""

import glob
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from finetune.recipe.addresses import is_place
from finetune.store.rank import is_first

_STEP = re.compile(r"(?P<path>.+?)(?P<step>@(?:\d{1,8}|last|best))?")


@dataclass
class _Known:
    """The user's places and those found so far, by the name in the plan."""

    bases: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)
    runs: dict[Path, Path] = field(default_factory=dict)
    """The directory of checkpoints of each run."""
    earlier: dict[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)


_known = _Known()


@contextmanager
def named(bases: Sequence[str], data: Mapping[str, str]) -> Iterator[None]:
    """Within it, searches these places first."""
    before = _known.bases, _known.data
    _known.bases, _known.data = tuple(bases), dict(data)
    try:
        yield
    finally:
        _known.bases, _known.data = before


@contextmanager
def anew() -> Iterator[None]:
    """Within it, nothing is known of the runs that this process has read before."""
    global _known
    before, _known = _known, _Known()
    try:
        yield
    finally:
        _known = before


def opened(run: Path, checkpoints: Path, places: Mapping[str, str]) -> None:
    """Reading a run: also search near it, and its recorded places."""
    _known.runs.setdefault(run.absolute(), checkpoints.absolute())
    _known.earlier.update(places)


def bases() -> tuple[str, ...]:
    return _known.bases


def arguments() -> list[str]:
    """The user's places as arguments, for the process that does the work."""
    return [*(f"--base={name}" for name in _known.bases), *(f"--data={old}={new}" for old, new in _known.data.items())]


def data(recorded: str) -> str | None:
    """The place of a file by `--data`: by its own name, or by that of a folder above it."""
    for old, new in _known.data.items():
        if PurePath(recorded) == PurePath(old):
            return new
        if PurePath(old) in PurePath(recorded).parents:
            return str(PurePath(new) / PurePath(recorded).relative_to(old))
    return None


def around(recorded: str) -> Iterator[str]:
    """Existing candidates: the recorded name, earlier places, and the same path under a folder above a run."""
    name, step = _without_step(recorded)
    path = PurePath(name)
    parts = [part for part in path.parts if part != path.anchor]
    tails = [PurePath(*parts[start:]) for start in range(len(parts) if path.is_absolute() else 1)]
    beside = (above / tail for run in _known.runs for above in run.parents for tail in tails)
    seen = set()
    before = filter(None, (_known.found.get(recorded), _known.earlier.get(recorded)))
    for name in (recorded, *before, *(f"{place}{step}" for place in beside)):
        if name not in seen and is_there(name):
            seen.add(name)
            yield name


def in_checkpoints(name: str) -> Iterator[str]:
    """The file of this name in each checkpoint of the runs being read, newest first."""
    for checkpoints in reversed(_known.runs.values()):
        yield from sorted(map(str, checkpoints.glob(f"*/{name}")), reverse=True)


def is_there(name: str) -> bool:
    """Whether there is such a file or folder, a file that a glob matches, or such a run of a ref like RUN@500. In a mirror, who fetches it
    sees."""
    if is_place(name) or os.path.exists(name) or os.path.exists(_without_step(name)[0]):
        return True
    return glob.has_magic(name) and next(glob.iglob(name, recursive=True), None) is not None


def _without_step(name: str) -> tuple[str, str]:
    """The path of a ref like RUN@500, and its step with the sign before it; empty if it has none."""
    match = _STEP.fullmatch(name)
    return (match["path"], match["step"] or "") if match else (name, "")


def found(recorded: str, place: str, what: str) -> str:
    """Records the place, and prints it once: it has the content of the recorded name."""
    if _known.found.get(recorded) != place:
        _known.found[recorded] = place
        say(f"{what} {recorded} is now {place}: equal content")
    return place


def moved() -> dict[str, str]:
    """The new place of each moved file or folder, by recorded name."""
    return {old: os.path.abspath(new) if os.path.exists(new) else new for old, new in _known.found.items()}


def say(line: str) -> None:
    if is_first(os.environ):  # all ranks find it; one says so
        print(line, file=sys.stderr, flush=True)
