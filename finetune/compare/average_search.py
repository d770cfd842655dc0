"""`average --search`: makes the usual averages of a run's commits, compares them with the last one row by row, and keeps the one that
is better. A kill leaves no average that is not whole."""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from finetune.compare import average_disk
from finetune.compare.average import MemberFacts, average, refuse_launcher
from finetune.compare.average_choice import Choices, OptionError
from finetune.compare.average_replay import Window
from finetune.compare.average_usual import Usual, checkpoint_of, refuse_options, usual
from finetune.compare.candidates import candidates
from finetune.compare.compare import Candidate, Question, compare
from finetune.compare.results import Asked
from finetune.compare.searched import Searched, Tried
from finetune.errors import CheckpointError, FinetuneError
from finetune.plan.facts import Metrics
from finetune.store import lock
from finetune.store.beside import remove, sweep
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.stored import opened
from finetune.store.checkpoints.verify import verify
from finetune.store.durable import failures, make_directory, rename
from finetune.store.run.directory import RunDirectory

ASKED = Asked(is_seen_allowed=True)  # all are of one run: what it has seen is the same for all, and a note says it
# Under way, or left by a kill: what lists averages skips it. Also the temporary folders of its making.
_HIDDEN = re.compile(r"\.step-.+\.search")
_STAGED = re.compile(rf"\.(?P<target>{_HIDDEN.pattern}(\.scratch)?)\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class _Place:
    """Where an average to try is, and where it will be if it is kept."""

    usual: Usual
    final: Path
    is_there: bool
    """Somebody made it before: nothing removes it."""
    is_kept: bool

    @property
    def path(self) -> Path:
        return self.final if self.is_there or self.is_kept else self.final.with_name(f".{self.final.name}.search")

    def make(self) -> None:
        """It is evaluated too, on all sets of its run, as an average that is made alone."""
        average(self.usual.refs, self.usual.choices, self.path)

    def keep(self) -> None:
        if not self.path.exists():  # another one had a lower loss
            self.make()
        if self.path != self.final:
            with failures(self.final):
                rename(self.path, self.final)

    def drop(self) -> None:
        """Removes what the search has made; nothing where it is kept, or gone."""
        if self.path != self.final and self.path.exists():
            with failures(self.path):
                remove(self.path)


def search(
    refs: Sequence[str],
    choices: Choices,
    output: Path | None = None,
    is_evaluated: bool = True,
    is_all_kept: bool = False,
) -> Searched:
    """Tries the usual averages of the stored steps of a run up to one of them, with a window also those of a decay over all its steps.

    The rows that choose are those that measure, so the interval of the chosen one allows for the choice (`interval_of_all`).
    """
    refuse_launcher()
    refuse_options(choices, {"--output": output is not None, "--no-evaluate": not is_evaluated})
    if len(refs) > 1:
        raise OptionError("--search takes one REF: the last checkpoint", hint=f"you gave {len(refs)}")
    run, checkpoint = checkpoint_of(refs[0])
    plan, _ = RunDirectory(run).plan()
    if not plan.holdout_counts.examples:
        hint = "set data.holdout in the recipe of a run, or choose an average yourself and `finetune compare` it"
        raise FinetuneError("holds out no rows, so nothing says which average is better", where=str(run), hint=hint)
    found, averages = usual(run, checkpoint, choices), RunDirectory(run).averages
    with _alone(averages):
        places = [_place(averages, each, is_all_kept) for each in found]
        missing = [place.usual for place in places if not place.is_there]
        if missing:
            needed = average_disk.needed_bytes(missing, checkpoint, plan, is_all_kept)
            _say(average_disk.announced(averages, missing, needed))
        try:
            return _searched(refs[0], checkpoint, places)
        finally:
            for place in places:
                place.drop()


def _searched(text: str, checkpoint: Checkpoint, places: Sequence[_Place]) -> Searched:
    baseline = candidates([text], ASKED, None)
    tried = [baseline.candidates[0], *_evaluated(places)]
    facts = compare(tried, Question(changed=0), None)
    chosen = next((place for place in places if str(place.final) == facts["best"]), None)
    if chosen:
        chosen.keep()
    alone: list[MemberFacts] = [{"ref": f"{checkpoint.path.parents[1]}@{checkpoint.step}", "weight": 1.0}]
    return {
        **facts,
        "notes": [*baseline.notes, *facts["notes"]],
        "ref": facts["best"],
        "members": _members(chosen.usual) if chosen else alone,
        "metrics": next(_metrics(each) for each in tried if each.ref == facts["best"]),
        "averages": [_tried(place) for place in places],
    }


def _evaluated(places: Sequence[_Place]) -> Iterator[Candidate]:
    """Of those that need not be kept, only the one with the lowest loss stays on the disk."""
    lowest, best = math.inf, None
    for number, place in enumerate(places, 1):
        if not place.is_there:
            place.make()
        (found,) = candidates([str(place.path)], ASKED, None).candidates
        loss = _metrics(found)["loss"]
        _say(f"{number} of {len(places)}: {place.usual.choices.words}: loss {loss:.6g}")
        dropped = place
        if loss < lowest:
            lowest, best, dropped = loss, place, best
        if dropped:
            dropped.drop()
        yield replace(found, origin=replace(found.origin, text=str(place.final)))


def _tried(place: _Place) -> Tried:
    return {
        "ref": str(place.final),
        "choices": place.usual.choices.words,
        "command": place.usual.command,
        "members": _members(place.usual),
        "is_kept": place.final.is_dir(),
    }


def _members(usual: Usual) -> list[MemberFacts]:
    return [{"ref": each.ref, "weight": each.weight} for each in usual.named]


def _metrics(candidate: Candidate) -> Metrics:
    return {name: float(value) for name, value in candidate.evaluation.about["metrics"].items()}


def _place(averages: Path, usual: Usual, is_all_kept: bool) -> _Place:
    """The same average that is there already; else the first name that is free: other commits may have been the last ones once."""
    for number in count(1):
        final = averages / (usual.folder if number == 1 else f"{usual.folder}-{number}")
        if not final.exists() or _is_same(final, usual):
            break
    return _Place(usual, final, final.exists(), is_all_kept)


def _is_same(path: Path, usual: Usual) -> bool:
    there = opened(path)
    if not isinstance(there, Checkpoint) or there.manifest.method != usual.choices.words or verify(path):
        return False
    members = (there.manifest.members, Window(usual.named).records)
    one, other = ([(each["ref"].rpartition("@")[2], each["digest"], each["weight"]) for each in of] for of in members)
    return one == other


@contextmanager
def _alone(averages: Path) -> Iterator[None]:
    """For one search at a time in a run. What a killed one left is removed first."""
    with failures(averages):
        make_directory(averages)
        held = os.open(averages, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            is_alone = lock.take(held)
        except BlockingIOError:
            hint = "wait until it ends"
            raise CheckpointError("another search is under way", where=str(averages), hint=hint) from None
        if is_alone:  # False without locks: then another one may be at work
            with failures(averages):
                _clear(averages)
        yield
    finally:
        os.close(held)


def _clear(averages: Path) -> None:
    for path in list(averages.iterdir()):
        if match := _STAGED.fullmatch(path.name):
            sweep(averages / match["target"])
        elif _HIDDEN.fullmatch(path.name):
            remove(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
