"""From a recipe's `path` to files: one file, all that a glob matches, all in a folder, or those of `datasets.save_to_disk`.

Files come in the order of the bytes of their names. No link to a folder is followed: it could leave the place, or lead back.
"""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from finetune.errors import DataError, counted
from finetune.recipe.schema.source_rules import ending_of

SAVED, SPLITS = "state.json", "dataset_dict.json"  # of `datasets`


@dataclass(frozen=True)
class Files:
    """The files of a source in order, and what a folder has beside them."""

    names: tuple[str, ...]
    unread: tuple[str, ...] = ()
    is_one: bool = False
    """Whether the path names one file itself."""


def files_of(path: str, endings: dict[str, str]) -> Files:
    """The files of a path. `endings` are those that can be read, each with its kind: several kinds are refused."""
    if os.path.isdir(path):
        if saved := _saved(path):
            return Files(tuple(saved))
        return of_one_kind(path, sorted(_inside(path), key=os.fsencode), endings)
    if glob.has_magic(path) and not os.path.lexists(path):
        names = sorted(_matching(path), key=os.fsencode)
        if not names:
            raise DataError("no file matches", where=path, hint="a path is seen from the working directory")
        return of_one_kind(path, names, endings)
    return Files((path,), is_one=True)


def of_one_kind(path: str, names: Sequence[str], endings: dict[str, str]) -> Files:
    known = [name for name in names if ending_of(name) in endings]
    unread = tuple(name for name in names if ending_of(name) not in endings)
    found = Counter(endings[ending_of(name)] for name in known)
    if not known:
        others = f": it has {', '.join(sorted({_ending(name) for name in unread}))}" if unread else ""
        hint = f"rows are read from {', '.join(endings)}"
        raise DataError(f"has no file of rows{others}", where=path, hint=hint)
    if len(found) > 1:
        listed = ", ".join(counted(count, f"{kind} file") for kind, count in sorted(found.items()))
        usual = found.most_common(1)[0][0]
        ending = next(ending_of(name) for name in known if endings[ending_of(name)] == usual)
        hint = f"name those of one kind, like `{PurePath(path) / ('**/*' + ending) if os.path.isdir(path) else '*' + ending}`"
        raise DataError(f"has files of several kinds: {listed}", where=path, hint=hint)
    return Files(tuple(known), unread)


def _ending(name: str) -> str:
    return f"`{PurePath(name).suffix or PurePath(name).name}`"


def _saved(folder: str) -> list[str]:
    """The files that `datasets.save_to_disk` wrote into a folder, in its order; none if it did not write the folder."""
    if os.path.isfile(os.path.join(folder, SPLITS)):
        splits = _json(os.path.join(folder, SPLITS), "splits")
        hint = f"name one, like `{PurePath(folder) / str(splits[0])}`" if splits else None
        raise DataError(f"has several splits: {', '.join(map(str, splits))}", where=folder, hint=hint)
    state = os.path.join(folder, SAVED)
    if not os.path.isfile(state) or not os.path.isfile(os.path.join(folder, "dataset_info.json")):
        return []
    names = [each.get("filename") if isinstance(each, dict) else None for each in _json(state, "_data_files")]
    if not all(isinstance(name, str) and PurePath(name).name == name for name in names):
        raise DataError("does not name its files as `datasets` does", where=state, hint="save the data set again")
    return [os.path.join(folder, str(name)) for name in names]


def _json(name: str, key: str) -> list[object]:
    try:
        found = json.loads(Path(name).read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("is not what `datasets` writes", where=name, hint="save the data set again") from error
    return found if isinstance(found, list) else []


def _matching(pattern: str) -> Iterator[str]:
    if "**" not in PurePath(pattern).parts:
        yield from (name for name in glob.iglob(pattern) if not os.path.isdir(name) and _is_file(name))
        return
    parts = PurePath(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder = str(PurePath(*parts[:first])) if first else "."
    rule = rule_of(parts[first:])
    for name in _inside(folder):
        if rule.fullmatch(os.path.relpath(name, folder)):
            yield os.path.normpath(name) if folder == "." else name


def rule_of(parts: Sequence[str]) -> re.Pattern[str]:
    """The relative names that a glob with `**` matches."""
    rules = []
    for number, part in enumerate(parts):
        if part == "**":
            rules.append(".*" if number == len(parts) - 1 else "(?:[^/]+/)*")
        else:
            some = re.sub(r"\\\*", "[^/]*", re.sub(r"\\\?", "[^/]", _with_sets(part)))
            rules.append(some + ("" if number == len(parts) - 1 else "/"))
    return re.compile("".join(rules), re.DOTALL)


def _with_sets(part: str) -> str:
    pieces = re.split(r"(\[!?[^\]]+\])", part)
    return "".join(
        f"[{'^' if piece[1] == '!' else ''}{re.escape(piece[1:-1].removeprefix('!')).replace(chr(92) + '-', '-')}]"
        if piece[:1] == "[" and piece[-1:] == "]" and len(piece) > 2
        else re.escape(piece)
        for piece in pieces
    )


def _inside(folder: str) -> Iterator[str]:
    """All files below a folder that are not hidden."""

    def refuse(error: OSError) -> None:
        message = f"cannot be read: {(error.strerror or '').lower()}"
        raise DataError(message, where=str(error.filename), hint=f"let user {os.geteuid()} read it")

    for above, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(place := os.path.join(above, name)):
                hint = "name its target, or the files, with a source of their own"
                raise DataError("is a link to a folder, which is not followed", where=place, hint=hint)
        for name in files:
            if not name.startswith(".") and _is_file(place := os.path.join(above, name)):
                yield place


def _is_file(name: str) -> bool:
    """Whether it is a file, or a link to one. DataError for a link that leads nowhere."""
    if os.path.islink(name) and not os.path.exists(name):
        raise DataError("is a link that leads nowhere", where=name, hint="remove it, or restore its target")
    return os.path.isfile(name)
