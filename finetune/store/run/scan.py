"""Reads the journal of a run of any length, a line at a time. It keeps events in memory, and the place of each step's line.

Nothing here writes.
"""

import os
import weakref
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from finetune.errors import RunError
from finetune.store.run.directory import RunDirectory
from finetune.store.run.journal import broken, record_of
from finetune.store.run.records import EventRecord, StepRecord, is_rollback, is_step

_STEP_LINE = b'{"kind": "step", "step": '
_ATTEMPT = b'"attempt": "'
_LINE_BYTES = 4096  # read at once to find the end of a line; most have a tenth of it


class Steps(Mapping[int, StepRecord]):
    """The valid record of each step, read from the file on demand: memory has only the start of its line."""

    def __init__(self, path: Path, places: Mapping[int, int]):
        self._path = path
        self._places = places
        if places:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, step: int) -> StepRecord:
        place, line = self._places[step], b""
        while b"\n" not in line:
            more = os.pread(self._descriptor, _LINE_BYTES, place + len(line))
            if not more:
                break
            line += more
        record = record_of(line.partition(b"\n")[0])
        if record is None or not is_step(record) or record["step"] != step:
            raise RunError(
                f"the record of step {step} is damaged", where=str(self._path), hint="restore it from a copy"
            )
        return record

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, step: object) -> bool:
        return step in self._places

    def since(self, first: int) -> "Steps":
        """The records from a step on."""
        return Steps(self._path, {step: place for step, place in self._places.items() if step >= first})


class Scan(NamedTuple):
    """A whole journal, a line at a time."""

    events: list[EventRecord]
    """All events, oldest first."""
    steps: Steps


def read(run: Path) -> Scan:
    """Scans the journal, in about a hundred bytes a step; skips a torn last line. A broken line before it is a RunError, here or, within
    a step's line, on reading that step."""
    path = RunDirectory(run).journal
    found: list[EventRecord] = []
    places: dict[int, int] = {}
    place, torn = 0, None
    with path.open("rb") if path.exists() else BytesIO() as lines:
        for number, line in enumerate(lines, start=1):
            step, record = _step_of(line), None
            if step is None:
                record = record_of(line) if line.endswith(b"\n") else None
                step = record["step"] if record and is_step(record) else None
            if step is None and record is None:
                torn = torn or number
            elif torn:
                raise broken(path, torn)
            elif step is not None:
                places[step] = place
            elif record is not None and record["kind"] != "step":
                found.append(record)
                if is_rollback(record):
                    places = {each: where for each, where in places.items() if each < record["first"]}
            place += len(line)
    return Scan(found, Steps(path, places))


def events(run: Path) -> list[EventRecord]:
    """All records that are not steps, oldest first."""
    return read(run).events


def attempts(run: Path) -> dict[str, int]:
    """The number of the last line of each attempt."""
    path = RunDirectory(run).journal
    found: dict[str, int] = {}
    with path.open("rb") if path.exists() else BytesIO() as lines:
        for number, line in enumerate(lines):
            found[line[line.rfind(_ATTEMPT) + len(_ATTEMPT) :].partition(b'"')[0].decode(errors="replace")] = number
    return found


def _step_of(line: bytes) -> int | None:
    """The step of a line by `Journal`, without parsing the rest; None for any other line."""
    if not (line.startswith(_STEP_LINE) and line.endswith(b"}\n")):
        return None
    number = line[len(_STEP_LINE) : line.find(b",", len(_STEP_LINE))]
    return int(number) if number.isdigit() else None
