"""What a tracker has got of a run, in `trackers/NAME.json`. Never more than the tracker has durably."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.store.run.directory import RunDirectory


@dataclass(frozen=True)
class Sent:
    step: int
    evaluated: int
    """As in `Has`."""
    noted: int = 0
    """Events before this place of the journal were noted."""
    read: int = 0
    """The place where reading the journal goes on."""
    before: str = ""
    """What the journal has before that place: after a power cut it may be another one."""
    place: str = ""
    """Where a person finds the run."""


def read(run: Path, name: str) -> Sent | None:
    """None if it got nothing yet, or the file is damaged: the tracker is then asked what it has."""
    try:
        return Sent(**json.loads(RunDirectory(run).tracker(name).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def write(run: Path, name: str, sent: Sent) -> None:
    """Not synced: after a power cut an older one holds as well."""
    path = RunDirectory(run).tracker(name)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(asdict(sent)))
    os.replace(beside, path)
