"""The journal of a run of any length, read a line at a time: in memory are its events, and of each step the place of its line.

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
    """The record that counts for each step, read from the file when it is asked for: in memory is where its line begins."""

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
        """Those from a step on."""
        return Steps(self._path, {step: place for step, place in self._places.items() if step >= first})


class Scan(NamedTuple):
    """A whole journal, a line at a time."""

    events: list[EventRecord]
    """All that is not a step, oldest first."""
    steps: Steps


def read(run: Path) -> Scan:
    """What the journal has, in about a hundred bytes a step; a torn last line is skipped. A broken line before it is a RunError, here or,
    in the middle of a step's line, when that step is asked for."""
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
    """Of each attempt the number of its last line."""
    path = RunDirectory(run).journal
    found: dict[str, int] = {}
    with path.open("rb") if path.exists() else BytesIO() as lines:
        for number, line in enumerate(lines):
            found[line[line.rfind(_ATTEMPT) + len(_ATTEMPT) :].partition(b'"')[0].decode(errors="replace")] = number
    return found


def _step_of(line: bytes) -> int | None:
    """The step of a line that `Journal` wrote, without a look at the rest of it; None for any other line."""
    if not (line.startswith(_STEP_LINE) and line.endswith(b"}\n")):
        return None
    number = line[len(_STEP_LINE) : line.find(b",", len(_STEP_LINE))]
    return int(number) if number.isdigit() else None
