"""Reads a mirror: its records, and a run directory made from one."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.errors import MirrorError, RunError
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.checkpoints.stored import is_whole
from finetune.store.durable import failures, make_directory, rename, replace_file, sync_directory
from finetune.store.mirror.bucket import Bucket
from finetune.store.mirror.pieces import content_of, fetch
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


def restore(bucket: Bucket, path: Path, say: Say, count: int = 1) -> int | None:
    """Makes the run directory at `path` as it was at the newest commit that is whole in the mirror, with `count` checkpoints if there are
    so many; the step, or None if the mirror has none. The plan is written last: a directory without it is no run, and the next call
    continues there.

    MirrorError names each damaged object, and is raised if there are commits and none is whole.
    """
    run, is_empty = RunDirectory(path), True
    taken: list[CommitRecord] = []
    plan = b""
    for record in records(bucket, None, say):
        if record.kind != "full" or (taken and (record.run != taken[0].run or record.step == taken[-1].step)):
            continue
        is_empty = False
        try:
            _fetch_checkpoint(bucket, record, run)
            if not taken:
                plan = _fetch_rest(bucket, record, run)
            taken.append(record)
        except DamagedError as error:
            say(f"damaged: {error.message}; step {record.step} of the mirror is passed over")
            if error.object_name:
                # Gone, it is sent again: the steps that run again make the same bytes.
                bucket.remove([error.object_name])
                bucket.settle(f"Remove {error.object_name}, which is damaged")
        if len(taken) == count:
            break
    if taken:
        _put_in_place(taken, plan, run)
        return taken[0].step
    if is_empty:
        return None
    hint = "name another mirror, or begin again with another `mirror.to`"
    raise MirrorError("has no commit that is whole", where=bucket.place, hint=hint)


def _staging(run: RunDirectory, record: CommitRecord) -> Path:
    return run.attempt(record.step, "mirror", f"{record.number:08d}")


def _own(run: RunDirectory, record: CommitRecord) -> dict[str, MirroredFile]:
    """The files of the checkpoint, by their names in its directory."""
    inside = f"{run.checkpoint(record.step).relative_to(run.path).as_posix()}/"
    return {name.removeprefix(inside): file for name, file in record.files.items() if name.startswith(inside)}


def _fetch_checkpoint(bucket: Bucket, record: CommitRecord, run: RunDirectory) -> None:
    staging = _staging(run, record)
    for name, file in _own(run, record).items():
        # Renamed when it was whole, and compared below: a cut call need not be repeated.
        if not (staging / name).exists():
            write(bucket, file, staging / name)
    if not is_whole(staging):
        shutil.rmtree(staging)
        raise DamagedError(f"the files of step {record.step} are not those of its {MANIFEST}", where=bucket.place)


def _fetch_rest(bucket: Bucket, record: CommitRecord, run: RunDirectory) -> bytes:
    """Recipe, journal and records, as they were when this commit was sent. Returns the plan."""
    beside = (f"{run.checkpoints.relative_to(run.path)}/", run.plan_file.name)
    for name, file in record.files.items():
        if not name.startswith(beside):
            write(bucket, file, run.path / name, is_appended=run.path / name == run.journal)
    with failures(run.path, RunError):
        for path in [*run.records()]:  # of another commit, by a call that was cut
            if path.relative_to(run.path).as_posix() not in record.files:
                path.unlink()
    return content_of(bucket, record.files[run.plan_file.name])


def _put_in_place(taken: list[CommitRecord], plan: bytes, run: RunDirectory) -> None:
    with failures(run.path, RunError):
        make_directory(run.checkpoints)
        for step in run.stored_steps():
            shutil.rmtree(run.checkpoint(step))
        for record in taken:
            sync_directory(_staging(run, record))
            rename(_staging(run, record), run.checkpoint(record.step))
        replace_file(run.plan_file, plan)


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
