"""Tells a hung training from a running one: compares the time since its last record with its own bound on silence."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import psutil

from finetune.errors import RunError, duration
from finetune.store.run import holder as holders
from finetune.store.run import journal, silence
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import is_event


def trainings(run_of: Callable[[str, Sequence[str]], Path | None]) -> dict[Path, float]:
    """The runs trained by processes here, each with the start (seconds of the epoch) of its newest process. `run_of` finds the run of
    a command, `train` or `launch`, and its arguments. RunError if only other users train: their relative paths cannot be resolved."""
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
    """The state of a run."""

    run: str
    ok: bool
    state: str
    step: int | None
    quiet_seconds: float
    limit_seconds: float | None
    """Seconds it may be silent."""
    is_finished: bool
    warnings: list[str]
    """What does not end a training, and may make it useless: experts that starve, tensors without a gradient."""


class HealthReport(TypedDict):
    """What `health --json` prints."""

    ok: bool
    runs: list[Health]


def look_at_all(found: Mapping[Path, float], patience_seconds: float) -> list[Health]:
    """The state of each of `trainings`. One that cannot be read (a newer version trains it, or its journal is damaged) hides no other."""
    looks = []
    for run, since in found.items():
        try:
            looks.append(look(run, patience_seconds, since))
        except RunError as error:
            looks.append(_unreadable(run, error))
    return looks


def _unreadable(run: Path, error: RunError) -> Health:
    where = f"{error.where}: " if error.where else ""
    return {
        "run": str(run),
        "ok": False,
        "state": "unreadable",
        "step": None,
        "quiet_seconds": 0.0,
        "limit_seconds": None,
        "is_finished": False,
        "warnings": [f"{where}{error.message}"],
    }


def look(run: Path, patience_seconds: float, since: float = 0.0) -> Health:
    """The state of a run. `ok` is False if its process is gone, or if it recorded nothing for `patience_seconds` and for SLOW times its
    usual pause.

    During a save the bound grows by the time of the slowest disk, because training may wait for it. A living training is `ok`
    before its first step (a download or an encoding may take hours) and after the commit of its last. If the holder is dead or began before
    `since`, a new process has not taken the run yet, and the records are those of a killed one. RunError if there is no run, or its
    journal is damaged.
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
        "warnings": _warnings(run, mine) if mine else [],
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


def _warnings(run: Path, said: silence.Silence) -> list[str]:
    """The newest warning of each kind of an attempt. Reads the journal only if there is one."""
    steps = [(name, getattr(said, name)) for name in silence.WARNINGS]
    found = [journal.newest_pair(run, name)[-1:] for name, step in steps if step is not None]
    return [
        f"step {record['step']}: {record['message']}" for records in found for record in records if is_event(record)
    ]


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
    """The step of an ended training, and whether it is the last one of its plan."""
    stored = max(RunDirectory(run).stored_steps(), default=0)
    end = RunDirectory(run).plan()[0].steps if RunDirectory(run).is_run else None
    return {**facts, "state": "ended", "step": max(stored, facts["step"] or 0), "is_finished": stored == end}


def _has_recorded(run: Path, attempt: str) -> bool:
    """Whether an attempt by older code has begun: it wrote no bound on silence."""
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
    warnings: Sequence[str] = (),
) -> str:
    told = "".join(f"\n  warning: {warning}" for warning in warnings)
    if state == "unreadable":
        return f"{run}: cannot be read{told}"
    if state == "ended":
        how = "finished" if is_finished else "stopped, and the same command resumes"
        return f"{run}: {how}: step {step}, {duration(quiet_seconds)} ago{told}"
    at = f" at step {step}" if step is not None else ""
    limit = f", {'more than' if not ok else 'hung after'} {limit_seconds:.0f}" if limit_seconds is not None else ""
    return f"{run}: {state}{at}, nothing recorded for {quiet_seconds:.0f} seconds{limit}{told}"
