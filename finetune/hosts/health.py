"""Whether a training goes on or hangs: how long its journal has been quiet, beside what its own steps and evaluations
took. `finetune health` asks, as the healthcheck of a container."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import psutil

from finetune.errors import RunError, duration
from finetune.store.durable import SLOWEST_DISK, STALL_SECONDS
from finetune.store.run import holder as holders
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import Record

SLOW = 10
"""A training that takes so many times what it usually takes is still slow, not hung."""
RECENT_RECORDS = 1_000


def trainings(run_of: Callable[[str, Sequence[str]], Path | None]) -> dict[Path, float]:
    """The runs that processes here train, and since when (the epoch's seconds) the newest of these processes does; `run_of` tells a run from
    a command, `train` or `launch`, and its arguments. RunError where somebody else trains, and nobody beside them: a relative path cannot
    be told then."""
    found: dict[Path, float] = {}
    strangers = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if (run := _run_of_process(process, run_of)) is None:
                continue
            try:
                place = run if run.is_absolute() else Path(process.cwd()) / run
            except psutil.AccessDenied:
                strangers.append((process.pid, run))
            else:
                found[place] = max(found.get(place, 0.0), process.create_time())
    if strangers and not found:
        pid, run = strangers[0]
        message = f"is trained by process {pid} of another user, so its place is not known"
        raise RunError(message, where=str(run), hint="ask as that user, or name the run")
    return {run: since for run, since in sorted(found.items()) if RunDirectory(run).lease.exists()}


def _run_of_process(process: psutil.Process, run_of: Callable[[str, Sequence[str]], Path | None]) -> Path | None:
    with suppress(psutil.AccessDenied):  # of a system that hides the processes of others
        words = process.cmdline()
        for place, command in enumerate(words[1:], start=1):
            if command in ("train", "launch") and Path(words[place - 1]).name == "finetune":
                return run_of(command, words[place + 1 :])
    return None


class Health(TypedDict):
    """How a run is."""

    run: str
    ok: bool
    state: str
    step: int | None
    quiet_seconds: float
    limit_seconds: float | None
    """How long it may be quiet."""
    is_finished: bool


class HealthReport(TypedDict):
    """What `health --json` prints."""

    ok: bool
    runs: list[Health]


def look(run: Path, patience_seconds: float, since: float = 0.0) -> Health:
    """How a run is: `ok` is False where nothing was recorded for `patience_seconds`, and for SLOW times the usual pause as well; or where its
    process is gone.

    While a save is under way it may be quiet for as much longer as the slowest disk takes: it may wait for it. Before its first step a
    training is not judged, for a download or an encoding may take hours; nor is one whose last step is committed. A training that runs
    only `since` then has not taken the run yet, where the holder is dead or older: what is there is of one that was killed. RunError
    where there is no run, or its journal is damaged.
    """
    holder = holders.read(RunDirectory(run).lease)
    if holder is None:
        raise RunError("is not a run directory: nobody has trained there", where=str(run), hint="name another one")
    if holder == holders.UNKNOWN:
        raise RunError("its lease.json cannot be read", where=str(run), hint="ask as the user who trains")
    stored = _newest_stored(run)
    records = _recent(run)
    mine = [record for record in records if record["attempt"] == holder.attempt]
    steps = [record["step"] for record in mine if record["kind"] == "step"]
    last = datetime.fromisoformat(mine[-1]["time"] if mine else holder.since)
    quiet_seconds = max(0.0, (datetime.now(UTC) - last).total_seconds())
    facts: Health = {
        "run": str(run),
        "ok": True,
        "state": "starting",
        "step": steps[-1] if steps else None,
        "quiet_seconds": round(quiet_seconds, 1),
        "limit_seconds": None,
        "is_finished": False,
    }
    if holder.released is not None:
        end = RunDirectory(run).plan()[0].steps if RunDirectory(run).is_run else None
        step = max([stored, *steps], default=0)
        return {**facts, "step": step, "state": "ended", "is_finished": stored == end}
    is_dead = holders.is_dead_here(holder)
    is_older = datetime.fromisoformat(holder.since).timestamp() + 1 < since  # it is told in whole seconds
    if since and (is_dead or (is_older and not holders.is_here(holder))):
        return {**facts, "step": None}
    if is_dead:
        return {**facts, "ok": False, "state": "killed"}
    if not steps:
        return facts
    end = RunDirectory(run).plan()[0].steps
    events = [record for record in mine if journal.is_event(record)]
    if any(record["event"] == "committed" and record["step"] == end for record in events):
        return {**facts, "state": "finished"}
    of_evaluations = _usual_pause(records, "evaluated")
    if not of_evaluations:  # they may be rare
        of_evaluations = _usual_pause(journal.newest_pair(run, "evaluated"), "evaluated")
    limit, state = max(patience_seconds, SLOW * max(_usual_pause(records, "step"), of_evaluations)), "training"
    if quiet_seconds > limit and (saves := _saves(run, stored, holder.attempt)):
        limit, state = limit + STALL_SECONDS + sum(map(_bytes, saves)) / SLOWEST_DISK, "saving"
    if quiet_seconds > limit:
        state = "hung"
    return {**facts, "ok": state != "hung", "state": state, "limit_seconds": round(limit, 1)}


def listing(facts: HealthReport) -> str:
    """A line about each run."""
    return "\n".join(_line(**each) for each in facts["runs"]) or "nothing is trained here"


def _line(
    run: str,
    ok: bool,
    state: str,
    step: int | None,
    quiet_seconds: float,
    limit_seconds: float | None,
    is_finished: bool = False,
) -> str:
    if state == "ended":
        how = "finished" if is_finished else "stopped, and the same command resumes"
        return f"{run}: {how}: step {step}, {duration(quiet_seconds)} ago"
    at = f" at step {step}" if step is not None else ""
    limit = f", {'more than' if not ok else 'hung after'} {limit_seconds:.0f}" if limit_seconds is not None else ""
    return f"{run}: {state}{at}, nothing recorded for {quiet_seconds:.0f} seconds{limit}"


def _recent(run: Path) -> list[Record]:
    """The newest records: however many steps there are since the last commit, no more are needed."""
    counted = itertools.count(1)
    return journal.read_since(run, lambda record: next(counted) == RECENT_RECORDS)


def _newest_stored(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max(RunDirectory(run).stored_steps(), default=0)


def _saves(run: Path, stored: int, attempt: str) -> list[Path]:
    """The directories that this attempt writes, or reads back: the journal has a save when both are done."""
    newest = [journal.newest_pair(run, name)[1:] for name in ("started", "committed")]
    known = {record["step"] for found in newest for record in found}
    read_back = [] if stored in known | {0} else [RunDirectory(run).checkpoint(stored)]
    return [*RunDirectory(run).saves(attempt), *read_back]


def _bytes(save: Path) -> int:
    """So far; 0 where it has ended meanwhile."""
    try:
        return sum(file.stat().st_size for file in save.iterdir())
    except FileNotFoundError:
        return 0


def _usual_pause(records: Sequence[Record], wanted: str) -> float:
    """The median of the seconds between a step, or an event, and the record before, of the same attempt; 0 without any."""
    pauses = []
    for before, record in itertools.pairwise(records):
        name = record["event"] if record["kind"] == "event" else "step"
        if name == wanted and before["attempt"] == record["attempt"]:
            seconds = datetime.fromisoformat(record["time"]) - datetime.fromisoformat(before["time"])
            pauses.append(seconds.total_seconds())
    return statistics.median(pauses) if pauses else 0.0
