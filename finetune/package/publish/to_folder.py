"""Publishes a package to a folder: copied beside it, synced, compared, and put in place by one exchange of names.

At every moment the folder is the old package or the new one. The next call removes the leftovers of a killed one.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.errors import PublishError
from finetune.package.attest import provenance
from finetune.package.publish import ownership
from finetune.package.publish.shown import Published
from finetune.package.publish.trees import Files, digest, sha256_of, size_of
from finetune.package.verify.contents import files_of
from finetune.store.beside import staged, sweep
from finetune.store.durable import failures, sync_directory, sync_tree

PREFIX = "folder:"
RENAME_EXCHANGE = 2  # of renameat2(2)
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def publish(files: Mapping[str, Path], target: Path, is_dry_run: bool, is_replacing: bool = False) -> Published:
    """{target, revision, uploaded_bytes, commits, files, overwritten, is_dry_run}. Raises PublishError if something else is
    there, or the disk fails.

    In an earlier package people's additions stay. Their changes are overwritten with `is_replacing`, and refused without it.
    """
    place = Path(os.path.realpath(target))  # an exchange would remove a link, and leave its folder
    with failures(target, PublishError):
        there = _files_in(place)
        found = _sorted_out(there, files)
        wanted: Files = found.files
        revision, total = digest(wanted), sum(map(size_of, wanted.values()))
        facts: Published = {
            "target": f"{PREFIX}{target}",
            "revision": revision,
            "is_dry_run": is_dry_run,
            "files": [{"name": name, "bytes": size_of(content)} for name, content in wanted.items()],
            "overwritten": list(found.edited),
            "uploaded_bytes": total,
            "commits": 1,
        }
        if not is_dry_run and place.parent.is_dir():
            sweep(place)
        kept = {name: there[name] for name in sorted(there.keys() - wanted.keys() - {*found.gone})}
        whole = {**wanted, **kept}
        if there.keys() == whole.keys() and digest(there) == digest(whole):  # reads only files that may be equal
            return {**facts, "uploaded_bytes": 0, "commits": 0}
        if os.path.lexists(place) and not _may_go(place):
            raise PublishError("has something else", where=str(target), hint="name a new folder, or remove this one")
        if not is_replacing:
            ownership.refuse_edited(found, str(target))
        if not is_dry_run:
            _replace(place, digest(there), wanted, kept)
        return facts


def _files_in(directory: Path) -> dict[str, Path]:
    return files_of(directory) if directory.is_dir() else {}


def _sorted_out(there: Mapping[str, Path], files: Files) -> ownership.Sorted:
    return ownership.sort_out(
        there.keys(),
        files,
        is_same=lambda name, content: (
            size_of(content) == size_of(there[name]) and sha256_of(content) == sha256_of(there[name])
        ),
        read=lambda name: there[name].read_bytes(),
        sha256_of=lambda name: sha256_of(there[name]),
    )


def _may_go(place: Path) -> bool:
    """Whether the existing content can be carried over: plain files beside a package, or nothing."""
    if not place.is_dir():
        return False
    paths = list(place.rglob("*"))
    is_plain = all((path.is_file() or path.is_dir()) and not path.is_symlink() for path in paths)
    return not paths or (is_plain and (place / provenance.FILE).is_file())


def _replace(place: Path, before: str, wanted: Files, kept: Mapping[str, Path]) -> None:
    """`before` is the digest of the content that may go, after people's additions are carried over."""
    with staged(place) as staging:
        _copy(wanted, staging, shutil.copyfile)
        _copy(kept, staging, shutil.copy2)
        sync_tree(staging)
        if digest(files_of(staging)) != digest({**wanted, **kept}):
            raise PublishError("the copy is not what was copied", where=str(place), hint="look at this disk")
        if digest(_files_in(place)) != before:  # a copy of large weights takes minutes
            hint = "look at what was written there, and publish again"
            raise PublishError("was changed by somebody else meanwhile", where=str(place), hint=hint)
        _take_place(staging, place)
        sync_directory(place.parent)


def _copy(files: Files, directory: Path, copy_file: Callable[[Path, Path], object]) -> None:
    for name, content in files.items():
        copy = directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            copy.write_bytes(content)
        else:
            copy_file(content, copy)


def _take_place(staging: Path, place: Path) -> None:
    """Exchanges the names of the staged folder and the place, by one call."""
    if not place.exists() or not any(place.iterdir()):
        os.rename(staging, place)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28; macOS lacks it
    here = -100  # AT_FDCWD
    if renameat2 and not renameat2(here, os.fsencode(staging), here, os.fsencode(place), RENAME_EXCHANGE):
        return
    number = ctypes.get_errno() if renameat2 else errno.ENOSYS
    if number in NO_EXCHANGE:
        hint = "name a new folder, and move it there yourself"
        raise PublishError("this file system cannot exchange two folders", where=str(place), hint=hint)
    raise OSError(number, os.strerror(number), str(place))
