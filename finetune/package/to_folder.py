"""Floor 7. A package goes to a folder: copied beside it, synced, compared, and put in its place by one exchange of names; `publish` calls it.

At every moment the folder is the old package or the new one. What a killed call left beside it, the next one removes.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from finetune.checkpoints.store import failures, sync_directory
from finetune.errors import PublishError
from finetune.package import ownership, provenance
from finetune.package.contents import files_of
from finetune.package.repository import Files, digest, sha256_of, size_of
from finetune.package.staging import staged, sweep

PREFIX = "folder:"
RENAME_EXCHANGE = 2  # of renameat2(2)
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def publish(files: Mapping[str, Path], target: Path, is_dry_run: bool, is_replacing: bool = False) -> dict:
    """{target, revision, uploaded_bytes, commits, files, is_dry_run}. PublishError where something else is there, or the disk fails.

    `is_replacing`: into an earlier package that people changed too. What they added stays, links apart.
    """
    place = Path(os.path.realpath(target))  # an exchange would take a link away, and leave the folder it leads to
    with failures(target, PublishError):
        there = _files_in(place)
        found = _sorted_out(there, files)
        wanted: Files = found.files
        revision, total = digest(wanted), sum(map(size_of, wanted.values()))
        facts = {"target": f"{PREFIX}{target}", "revision": revision, "is_dry_run": is_dry_run}
        facts |= {"files": [{"name": name, "bytes": size_of(content)} for name, content in wanted.items()]}
        if not is_dry_run and place.parent.is_dir():
            sweep(place)
        if there.keys() == wanted.keys() and digest(there) == revision:  # only what can be the same is read
            return facts | {"uploaded_bytes": 0, "commits": 0}
        kept = {name: there[name] for name in sorted(there.keys() - wanted.keys() - {*found.gone})}
        if os.path.lexists(place) and not _may_go(place, kept, is_replacing):
            _refuse(target, place, kept)
        if not is_replacing:
            ownership.refuse_edited(found, str(target))
        if not is_dry_run:
            _replace(place, digest(there), {**wanted, **kept})
        return facts | {"uploaded_bytes": total, "commits": 1}


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


def _may_go(place: Path, kept: Mapping[str, Path], is_replacing: bool) -> bool:
    """Whether nothing is lost with what is there: it came with a package, or is carried over."""
    if not place.is_dir():
        return False
    paths = list(place.rglob("*"))
    is_plain = all((path.is_file() or path.is_dir()) and not path.is_symlink() for path in paths)
    is_package = (place / provenance.FILE).is_file() and (is_replacing or not list(provenance.findings(place)))
    return not paths or (is_plain and is_package and (is_replacing or not kept))


def _refuse(target: Path, place: Path, kept: Mapping[str, Path]) -> NoReturn:
    names = []
    if (place / provenance.FILE).is_file():
        names = sorted({*kept, *(finding.file for finding in provenance.findings(place))})
    told = f"has something else: {', '.join(names[:3])}" if names else "has something else"
    hint = "name a new folder, or use --replace: what was added stays, what was changed is overwritten"
    raise PublishError(told, where=str(target), hint=hint if names else "name a new folder, or remove this one")


def _replace(place: Path, before: str, wanted: Files) -> None:
    """`before` is the digest of what may go."""
    with staged(place) as staging:
        _copy(wanted, staging)
        if digest(files_of(staging)) != digest(wanted):
            raise PublishError("the copy is not what was copied", where=str(place), hint="look at this disk")
        if digest(_files_in(place)) != before:  # a copy of large weights takes minutes
            hint = "look at what was written there, and publish again"
            raise PublishError("was changed by somebody else meanwhile", where=str(place), hint=hint)
        _take_place(staging, place)
        sync_directory(place.parent)


def _copy(files: Files, directory: Path) -> None:
    for name, content in files.items():
        copy = directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            copy.write_bytes(content)
        else:
            shutil.copyfile(content, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync_directory(folder)


def _take_place(staging: Path, place: Path) -> None:
    """The staged folder under the place's name, and what was there under the other's, by one call."""
    if not place.exists() or not any(place.iterdir()):
        os.rename(staging, place)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28; macOS has none
    here = -100  # AT_FDCWD
    if renameat2 and not renameat2(here, os.fsencode(staging), here, os.fsencode(place), RENAME_EXCHANGE):
        return
    number = ctypes.get_errno() if renameat2 else errno.ENOSYS
    if number in NO_EXCHANGE:
        hint = "name a new folder, and move it there yourself"
        raise PublishError("this file system cannot exchange two folders", where=str(place), hint=hint)
    raise OSError(number, os.strerror(number), str(place))
