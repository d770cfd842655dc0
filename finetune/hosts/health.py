"""Whether a training goes on or hangs: how long it has recorded nothing, beside how long it says that it may be silent."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import psutil

from finetune.errors import RunError, duration
from finetune.store.run import holder as holders
from finetune.store.run import journal, silence
from finetune.store.run.directory import RunDirectory


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
        raise RunError(
            "is not a run directory: no training was ever started there", where=str(run), hint="name another one"
        )
    if holder == holders.UNKNOWN:
        raise RunError("its lease.json cannot be read", where=str(run), hint="ask as the user who trains")
    last = silence.read(run)
    mine = last if last and last.attempt == holder.attempt else None
    moment = datetime.fromisoformat(mine.time if mine else holder.since)
    quiet_seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    facts: Health = {
        "run": str(run),
        "ok": True,
        "state": "starting",
        "step": mine.step if mine else None,
        "quiet_seconds": round(quiet_seconds, 1),
        "limit_seconds": None,
        "is_finished": False,
    }
    if holder.released is not None:
        return _ended(run, facts)
    is_dead = holders.is_dead_here(holder)
    is_older = datetime.fromisoformat(holder.since).timestamp() + 1 < since  # it has whole seconds
    if since and (is_dead or (is_older and not holders.is_here(holder))):
        return {**facts, "step": None}
    if is_dead:
        return {**facts, "ok": False, "state": "killed"}
    if mine is None:
        return {**facts, "state": "unknown"} if _has_recorded(run, holder.attempt) else facts
    if mine.step is None:
        return facts
    if mine.committed == RunDirectory(run).plan()[0].steps:
        return {**facts, "state": "finished"}
    return {**facts, **_judged(mine, quiet_seconds, patience_seconds)}


class _Judgement(TypedDict):
    ok: bool
    state: str
    limit_seconds: float | None


def _judged(said: silence.Silence, quiet_seconds: float, patience_seconds: float) -> _Judgement:
    limit, state = max(patience_seconds, said.may_last_seconds), "training"
    if quiet_seconds > limit and said.save_seconds:
        limit, state = limit + said.save_seconds, "saving"
    is_hung = quiet_seconds > limit
    return {"ok": not is_hung, "state": "hung" if is_hung else state, "limit_seconds": round(limit, 1)}


def _ended(run: Path, facts: Health) -> Health:
    """Of a training that has ended: at which step it is, and whether that is the last one of its plan."""
    stored = max(RunDirectory(run).stored_steps(), default=0)
    end = RunDirectory(run).plan()[0].steps if RunDirectory(run).is_run else None
    return {**facts, "state": "ended", "step": max(stored, facts["step"] or 0), "is_finished": stored == end}


def _has_recorded(run: Path, attempt: str) -> bool:
    """Whether an attempt has begun, by code that did not write how long it may be silent."""
    newest = journal.end_since(run, lambda record: True) or []
    return bool(newest) and newest[-1]["attempt"] == attempt


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
