"""A mirror read like a run on this disk: a run directory in the cache, with the manifests of all commits, and the files of those that
were asked for.

Every byte is compared with its digest when it is fetched. Nothing here writes to the mirror.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blake3

from finetune.errors import MirrorError
from finetune.store import cache, lock
from finetune.store.checkpoints.manifest import MANIFEST, Checkpoint
from finetune.store.durable import make_directory, replace_file
from finetune.store.mirror.bucket import Bucket
from finetune.store.mirror.opening import opened
from finetune.store.mirror.pulled import records, write
from finetune.store.mirror.records import CommitRecord
from finetune.store.mirror.records import parse as parse_record
from finetune.store.rank import is_first
from finetune.store.run.directory import RunDirectory
from finetune.store.strict_json import from_json, to_json

KIND = "mirrors"


def run_of(place: str) -> Path:
    """The run directory that stands for a mirror, as the mirror is now. MirrorError if there is no commit."""
    bucket = opened(place)
    found: dict[int, CommitRecord] = {}
    newest: CommitRecord | None = None
    for record in records(bucket, None, _say):
        newest = newest or record
        if record.run == newest.run:
            found.setdefault(record.step, record)
    if newest is None:
        raise MirrorError(
            "there is no commit of a run", where=place, hint="check the address: `mirror.to` of the recipe"
        )
    folder = cache.root() / KIND / blake3.blake3(place.encode()).hexdigest()[:16]
    run = RunDirectory(folder / newest.name)
    with _alone(folder):
        known = _known(run)
        if known and known[max(known)].run != newest.run:
            shutil.rmtree(run.path)
            known = {}
        make_directory(run.checkpoints)
        _keep_only(run, known, found)
        for record in found.values():
            _fetch_manifest(bucket, run, record)
        _fetch_rest(bucket, run, newest, known)
        kept = {str(step): record.to_bytes().decode() for step, record in found.items()}
        replace_file(run.mirrored_from, to_json({"place": place, "records": kept}).encode())
    return run.path


def place_of(run: Path) -> str | None:
    """The address of the mirror that a run directory stands for; None for any other directory."""
    path = RunDirectory(run).mirrored_from
    if not path.exists():
        return None
    facts = from_json(path.read_bytes())
    return str(facts["place"]) if isinstance(facts, dict) else None


def name_of(run: Path) -> str:
    """What a person calls a run: its path, or the address of the mirror that it stands for."""
    return place_of(run) or str(run)


def completed(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with its files: those that are only in a mirror yet are fetched. MirrorError names what is damaged there."""
    run = RunDirectory(checkpoint.path.absolute().parents[1])
    place = place_of(run.path)
    missing = [name for name in checkpoint.manifest.files if not (checkpoint.path / name).exists()]
    if place is None or not missing:
        return checkpoint
    with _alone(run.path.parent):
        record, bucket = _known(run)[checkpoint.step], opened(place)
        inside = checkpoint.path.relative_to(run.path).as_posix()
        for name in missing:
            if not (checkpoint.path / name).exists():
                write(bucket, record.files[f"{inside}/{name}"], checkpoint.path / name)
    return checkpoint


def _known(run: RunDirectory) -> dict[int, CommitRecord]:
    """The records that the directory was last made from, by step."""
    if not run.mirrored_from.exists():
        return {}
    facts = from_json(run.mirrored_from.read_bytes())
    kept = facts["records"] if isinstance(facts, dict) else {}
    return {int(step): parse_record(text.encode(), str(run.mirrored_from)) for step, text in kept.items()}


def _keep_only(run: RunDirectory, known: dict[int, CommitRecord], found: dict[int, CommitRecord]) -> None:
    """Removes what the mirror has no more, or has otherwise now."""
    for step in run.stored_steps():
        before, now = known.get(step), found.get(step)
        manifest = (run.checkpoint(step) / MANIFEST).relative_to(run.path).as_posix()
        if before is None or now is None or before.files[manifest] != now.files[manifest]:
            shutil.rmtree(run.checkpoint(step))


def _fetch_manifest(bucket: Bucket, run: RunDirectory, record: CommitRecord) -> None:
    path = run.checkpoint(record.step) / MANIFEST
    if not path.exists():
        write(bucket, record.files[path.relative_to(run.path).as_posix()], path)


def _fetch_rest(bucket: Bucket, run: RunDirectory, newest: CommitRecord, known: dict[int, CommitRecord]) -> None:
    """Plan, journal and the other records, of the newest commit. Files that were added here, like evaluations, stay."""
    before = known[max(known)].files if known else {}
    inside = run.checkpoints.relative_to(run.path).as_posix()
    for name, file in newest.files.items():
        is_there = before.get(name) == file and (run.path / name).exists()
        if not name.startswith(f"{inside}/") and not is_there:
            write(bucket, file, run.path / name)
    for path in [*run.records()]:
        name = path.relative_to(run.path).as_posix()
        if name in before and name not in newest.files:
            path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time fetches from a mirror; the others wait."""
    make_directory(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock.take(descriptor, is_waiting=True)
        yield
    finally:
        os.close(descriptor)


def _say(line: str) -> None:
    if is_first(os.environ):
        print(line, file=sys.stderr, flush=True)
