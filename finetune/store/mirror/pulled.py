"""Reads a mirror: its records, and a run directory made from one."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from finetune.errors import MirrorError, RunError
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.checkpoints.stored import is_whole
from finetune.store.durable import failures, make_directory, rename, sync_directory
from finetune.store.mirror.bucket import Bucket
from finetune.store.mirror.pieces import fetch
from finetune.store.mirror.records import COMMITS, CommitRecord, DamagedError, MirroredFile, parse, place_of
from finetune.store.run.directory import RunDirectory

Say = Callable[[str], object]


def records(bucket: Bucket, run: str | None, say: Say) -> Iterator[CommitRecord]:
    """The records that are whole, the latest step first, and of one step the newest; of the run with this id, if one is given. Damaged ones are said and passed over."""
    names = {name: place for name in bucket.sizes(COMMITS) if (place := place_of(name))}
    for name in sorted(names, key=names.__getitem__, reverse=True):
        content = bucket.read(name)
        if content is None:  # removed meanwhile
            continue
        try:
            record = parse(content, f"{bucket.place}/{name}")
        except DamagedError as error:
            say(f"damaged: {error.message}: {name}")
            continue
        if (record.step, record.number) != names[name] or (run and record.run != run):
            say(f"damaged: {name} is the record of another commit")
            continue
        yield record


def restore(bucket: Bucket, path: Path, say: Say) -> int | None:
    """Makes the run directory at `path` as it was at the newest commit that is whole in the mirror; its step, or None if the mirror has
    none. The plan is written last: a directory without it is no run, and the next call continues there.

    MirrorError names each damaged object, and is raised if there are commits and none is whole.
    """
    is_empty = True
    for record in records(bucket, None, say):
        if record.kind != "full":
            continue
        is_empty = False
        try:
            _restore(bucket, record, path)
        except DamagedError as error:
            say(f"damaged: {error.message}; step {record.step} of the mirror is passed over")
            if error.object_name:
                # Gone, it is sent again: the steps that run again make the same bytes.
                bucket.remove([error.object_name])
                bucket.settle(f"Remove {error.object_name}, which is damaged")
            continue
        return record.step
    if is_empty:
        return None
    raise MirrorError(
        "has no commit that is whole",
        where=bucket.place,
        hint="name another mirror, or begin again with another `mirror.to`",
    )


def _restore(bucket: Bucket, record: CommitRecord, path: Path) -> None:
    run = RunDirectory(path)
    destination = run.checkpoint(record.step)
    inside = destination.relative_to(path)
    own = {name: file for name, file in record.files.items() if PurePosixPath(name).is_relative_to(inside.as_posix())}
    last = run.plan_file.relative_to(path).as_posix()
    staging = run.attempt(record.step, "mirror", f"{record.number:08d}")
    with failures(path, RunError):
        make_directory(staging)
    for name, file in own.items():
        fetch_once(bucket, file, staging / PurePosixPath(name).name)
    if not is_whole(staging):
        raise DamagedError(f"the files of step {record.step} are not those of its {MANIFEST}", where=bucket.place)
    for name, file in record.files.items():
        if name not in own and name != last:
            write(bucket, file, path / name, is_appended=path / name == run.journal)
    with failures(path, RunError):
        _remove_others(run, record)
        sync_directory(staging)
        make_directory(run.checkpoints)
        if destination.exists():
            shutil.rmtree(destination)
        rename(staging, destination)
    write(bucket, record.files[last], run.plan_file)


def fetch_once(bucket: Bucket, file: MirroredFile, path: Path) -> None:
    """As `fetch`; a file that an earlier call completed stays."""
    # Written under its name only when it is whole, so its size is enough for now: the caller verifies it.
    if not path.exists():
        write(bucket, file, path)


def write(bucket: Bucket, file: MirroredFile, path: Path, is_appended: bool = False) -> None:
    """A file, whole or not at all: written beside its name and renamed. An old one is replaced."""
    beside = path.with_name(f"{path.name}.tmp")
    with failures(path, RunError):
        make_directory(path.parent)
        beside.unlink(missing_ok=True)
    fetch(bucket, file, beside, 0o666 if is_appended else 0o444)
    with failures(path, RunError):
        os.replace(beside, path)
        sync_directory(path.parent)


def _remove_others(run: RunDirectory, record: CommitRecord) -> None:
    """What an earlier call restored of another commit, and was cut."""
    for path in [*run.records()]:
        if path.relative_to(run.path).as_posix() not in record.files:
            path.unlink()
    for step in run.stored_steps():
        if step != record.step:
            shutil.rmtree(run.checkpoint(step))
