"""Sends what the trackers of a run lack, after a training that could not."""

import sys
from functools import partial
from pathlib import Path
from typing import TypedDict

from finetune.errors import Problem, RunError
from finetune.store import lock
from finetune.store.durable import make_directory
from finetune.store.run.directory import RunDirectory
from finetune.training.trackers import refuse_absent, sent
from finetune.training.trackers.processes import Tracked


class TrackerState(TypedDict):
    name: str
    step: int | None
    """The newest step that it has."""
    place: str | None
    problem: str | None
    """Why it does not have all."""


class Tracking(TypedDict):
    """What `track --json` prints."""

    trackers: list[TrackerState]


def send(run: Path) -> Tracking:
    """Waits until all has arrived, or a client fails or hangs. Raises RunError if another process feeds one."""
    plan, _ = RunDirectory(run).plan()
    names = [tracker.name for tracker in plan.recipe.track]
    refuse_absent(plan.recipe.track, partial(Problem, str(run)))
    for name in names:
        _refuse_fed(run, name)
    problems = Tracked(run, names, lambda line: print(line, file=sys.stderr, flush=True)).finish(None)
    return {"trackers": [_state(run, name, problems.get(name)) for name in names]}


def listing(facts: Tracking) -> str:
    """The same for a reader."""
    has = {
        each["name"]: "nothing" if each["step"] is None else f"up to step {each['step']}" for each in facts["trackers"]
    }
    if not has:
        return "its recipe has no trackers; add them with the key `track`"
    return "\n".join(f"{each['name']:12}{has[each['name']]:20}{each['place'] or ''}" for each in facts["trackers"])


def _refuse_fed(run: Path, name: str) -> None:
    make_directory(RunDirectory(run).trackers)
    with RunDirectory(run).tracker_lock(name).open("ab") as file:
        try:
            lock.take(file.fileno())
        except BlockingIOError:
            hint = "the training beside it sends all; wait for its end"
            raise RunError(f"tracker {name} gets the figures of another process", where=str(run), hint=hint) from None


def _state(run: Path, name: str, problem: str | None) -> TrackerState:
    known = sent.read(run, name)
    return {
        "name": name,
        "step": known.step if known else None,
        "place": known.place if known else None,
        "problem": problem,
    }
