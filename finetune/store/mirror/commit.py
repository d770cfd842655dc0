"""Reads one commit of a run, with the rest of the run as it is now, and sends its pieces."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from finetune.errors import CheckpointError
from finetune.store.checkpoints.manifest import MANIFEST, Manifest, read
from finetune.store.mirror.pieces import LOG_PIECE_BYTES, Sending
from finetune.store.mirror.records import CommitRecord, MirroredFile
from finetune.store.run.directory import RunDirectory

TRIES = 5
"""To read a set of files that a training merges meanwhile."""
Files = dict[str, MirroredFile]
Seen = dict[str, tuple[str, MirroredFile]]
"""Records beside the checkpoints that were sent, by their paths, with what changes with them: some are gigabytes, and never change."""


class DamagedHereError(CheckpointError):
    """A commit on this disk is not as it was committed."""


def send(
    run: RunDirectory, step: int, sending: Sending, known: Iterable[CommitRecord], seen: Seen
) -> tuple[Manifest, Files] | None:
    """The manifest and all files by their paths in the run directory; None if the commit was removed or demoted meanwhile. What `known` and `seen`
    have is not read again. DamagedHereError if a file has other bytes than were committed."""
    path = run.checkpoint(step)
    sign = sign_of(path)
    with ExitStack() as held:
        try:
            manifest = read(path).manifest
            names = [MANIFEST, *manifest.files]
            # All at once: what is open can be read to its end, also if the keep rules remove the checkpoint.
            files = {name: held.enter_context((path / name).open("rb")) for name in names}
        except (OSError, CheckpointError) as error:
            if not sign or sign_of(path) != sign:  # removed, or demoted, at this moment
                return None
            raise DamagedHereError(f"step {step} is damaged here: {error}", where=str(path)) from error
        there = {file.digest: file for record in known for file in record.files.values()}
        found = {}
        for name, opened in files.items():
            record = manifest.files.get(name)
            same = there.get(record.digest) if record else None
            found[name_of(run, path / name)] = sent = same if same and sending.has(same) else sending.file(opened)
            if record and sent.digest != record.digest:
                message = f"step {step} is damaged here: {name} has other bytes than were committed"
                raise DamagedHereError(message, where=str(path))
    return manifest, {**found, **_rest(run, sending, seen)}


def sign_of(checkpoint: Path) -> str:
    """What changes with a manifest; empty if there is none."""
    try:
        return _sign((checkpoint / MANIFEST).stat())
    except OSError:
        return ""


def _sign(status: os.stat_result) -> str:
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def name_of(run: RunDirectory, path: Path) -> str:
    return path.relative_to(run.path).as_posix()


def _rest(run: RunDirectory, sending: Sending, seen: Seen) -> Files:
    """The files of the run beside its checkpoints, the journal last."""
    for left in reversed(range(TRIES)):
        found: Files = {}
        try:
            for path in (run.recipe, run.plan_file, *run.records()):
                with path.open("rb") as file:
                    name, sign = name_of(run, path), _sign(os.fstat(file.fileno()))
                    before, same = seen.get(name, ("", None))
                    found[name] = same if same and before == sign and sending.has(same) else sending.file(file)
                    seen[name] = sign, found[name]
            break
        except FileNotFoundError:  # a training merged it meanwhile
            if not left:
                raise
    with run.journal.open("rb") as file:
        found[name_of(run, run.journal)] = sending.file(file, LOG_PIECE_BYTES, _whole_lines(file))
    return found


def _whole_lines(file: BinaryIO) -> int:
    """The size of a file without a torn last line, which a training may be writing now."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - LOG_PIECE_BYTES)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            end = start + found
            break
        end = start
    file.seek(0)
    return end
