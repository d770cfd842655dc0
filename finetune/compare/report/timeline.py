"""What happened in a run beside its steps: commits, stops and resumes, incidents, rollbacks, branches."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TypedDict

import numpy as np

from finetune.compare.report.buckets import Packed, packed
from finetune.compare.series import Series
from finetune.errors import counted, duration
from finetune.plan.disk import readable
from finetune.store.run import inspect
from finetune.store.run.directory import step_of
from finetune.store.run.records import EventRecord

MOST = 1500
"""Entries of all runs together; of more, the oldest commits go unlisted."""
STOPPED_SECONDS = 60
"""A pause before a resume that is worth its length."""


class Happening(TypedDict):
    step: int
    time: str
    kind: str
    """`commit`, `resume`, `incident`, `rollback` or `branch`."""
    text: str


class Timeline(TypedDict):
    happenings: list[Happening]
    tokens: Packed
    """The place of each on the other axes."""
    hours: Packed
    unlisted: int
    """Older commits."""


def timeline(series: Series, all_of_them: Sequence[Series]) -> Timeline:
    """Of one of several runs, in order of time."""
    found = [*_happenings(series.events), *_branched(series, all_of_them)]
    found.sort(key=lambda each: each["time"])
    commits = [place for place, each in enumerate(found) if each["kind"] == "commit"]
    unlisted = set(commits[: max(0, len(found) - MOST // len(all_of_them))])
    found = [each for place, each in enumerate(found) if place not in unlisted]
    steps = np.array([each["step"] for each in found], dtype=np.int64)
    tokens, hours = (packed(series.steps.at(axis, steps)) for axis in ("tokens", "hours"))
    return {"happenings": found, "tokens": tokens, "hours": hours, "unlisted": len(unlisted)}


def _happenings(events: Sequence[EventRecord]) -> Iterator[Happening]:
    before: EventRecord | None = None
    for record in events:
        kind = record["event"]
        if kind == "started":
            yield _of(record, "resume" if before else "start", _started(record, before))
        elif kind == "committed":
            about = readable(record["bytes"]) if "bytes" in record else ""
            yield _of(record, "commit", f"committed {about}".strip())
        elif kind == "extended":
            yield _of(record, "resume", f"extended from {record['steps'][0]:,} to {record['steps'][1]:,} steps")
        elif kind == "amended" and record["action"] == "rollback":
            text = f"{_said(record)}; back to step {record['to']:,}, {_skipped(record)} skipped"
            yield _of(record, "rollback", text)
        elif kind == "amended":
            yield _of(record, "incident", f"{_said(record)}; {_skipped(record)} skipped")
        elif kind in inspect.INCIDENTS:
            yield _of(record, "incident", _said(record))
        before = record


def _of(record: EventRecord, kind: str, text: str) -> Happening:
    step = record["step"] if "step" in record else step_of(record.get("file", "").partition("/")[0]) or 0
    return {"step": step, "time": record["time"], "kind": kind, "text": text}


def _started(record: EventRecord, before: EventRecord | None) -> str:
    world = record.get("world", {})
    on = f"on {counted(world['world_size'], 'process', 'processes')} ({world['device']})" if "device" in world else ""
    if before is None:
        return f"started {on}".strip()
    pause = (datetime.fromisoformat(record["time"]) - datetime.fromisoformat(before["time"])).total_seconds()
    after = f", {duration(pause)} after the last event" if pause > STOPPED_SECONDS else ""
    return f"resumed {on}".strip() + after


def _said(record: EventRecord) -> str:
    return str(
        record.get("message")
        or inspect.MESSAGES.get(record["event"], record["event"]).format(**{"quantity": "something"} | record)
    )


def _skipped(record: EventRecord) -> str:
    first, last = record["first"], record["last"]
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _branched(series: Series, others: Sequence[Series]) -> Iterator[Happening]:
    for other in others:
        parent = other.plan.parent
        if parent and parent.run == series.identity:
            branched = next((each for each in other.events if each["event"] == "branched"), None)
            changes = "; ".join(parent.changes)
            text = f"{other.run} branches off" + (f": {changes}" if changes else "")
            yield {"step": parent.step, "time": branched["time"] if branched else "", "kind": "branch", "text": text}
