"""Repositories as the Hub keeps them: files by content, commits, branches and tags; no network here.

Ids are those of git: a file's is the hash of its blob, or of its pointer where it is stored by LFS.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Literal

LFS = ("*.safetensors", "*.bin", "*.parquet", "*.gguf", "*.arrow")
LFS_BYTES = 10 * 2**20  # a file of this size is stored by LFS whatever its name


class MissingError(Exception):
    """What was asked for is not here; `code` is what the Hub says in X-Error-Code."""

    def __init__(self, code: Literal["RepoNotFound", "RevisionNotFound", "EntryNotFound"], commit: str | None = None):
        self.code = code
        self.commit = commit
        super().__init__(code)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        return git_hash("blob", self.pointer if self.is_lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    files: Mapping[str, File]
    parent: str | None
    title: str

    def file(self, path: str) -> File:
        if path not in self.files:
            raise MissingError("EntryNotFound", self.oid)
        return self.files[path]

    def entries(self, folder: str, is_recursive: bool) -> Iterator[tuple[str, File | None]]:
        """Paths under a folder ("" is the root) with their files, None for a folder; a missing folder is an error."""
        prefix = f"{folder}/" if folder else ""
        seen = set()
        for path, file in sorted(self.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if is_recursive else min(len(parts), 2)):
                between = prefix + "/".join(parts[:depth])
                if between not in seen:
                    seen.add(between)
                    yield between, None
            if is_recursive or len(parts) == 1:
                seen.add(path)
                yield path, file
        if folder and not seen:
            raise MissingError("EntryNotFound", self.oid)


@dataclass
class Repo:
    """One repository. `readers` are the tokens that may read it where it is gated or private."""

    kind: Literal["model", "dataset"]
    name: str
    is_gated: bool = False
    is_private: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded for LFS, by its hash, committed or not."""
    parts: dict[str, dict[int, tuple[str, bytes]]] = field(default_factory=dict)
    """Pieces of large objects on their way: ETag and content, by hash and number."""

    def __post_init__(self) -> None:
        self.branches["main"] = self._add({}, None, "initial commit")

    def commit(self, files: Mapping[str, bytes | None], branch: str = "main", title: str = "a commit") -> str:
        """Moves a branch, made at `main` if need be, to a tree with these files changed (None: deleted)."""
        return self.change(
            {
                path: None if content is None else File(content, is_lfs(path, len(content)))
                for path, content in files.items()
            },
            branch,
            title,
        )

    def change(self, files: Mapping[str, File | None], branch: str, title: str) -> str:
        """The same with files as they are stored."""
        parent = self.branches.get(branch, self.branches["main"])
        before = self.commits[parent].files
        after = {path: file for path, file in {**before, **files}.items() if file is not None}
        self.objects |= {file.sha256: file.content for file in after.values() if file.is_lfs}
        self.branches[branch] = self._add(after, parent, title)
        return self.branches[branch]

    def commit_directory(self, directory: Path, branch: str = "main") -> str:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return self.commit({path.relative_to(directory).as_posix(): path.read_bytes() for path in files}, branch)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a commit's own id, in full or from its start."""
        oid = self.branches.get(revision.removeprefix("refs/heads/")) or self.tags.get(revision)
        if oid is None and len(revision) >= 7:
            oid = next((oid for oid in self.commits if oid.startswith(revision)), None)
        if oid is None:
            raise MissingError("RevisionNotFound")
        return self.commits[oid]

    def _add(self, files: Mapping[str, File], parent: str | None, title: str) -> str:
        tree = "".join(f"{file.oid} {path}\n" for path, file in sorted(files.items()))
        oid = git_hash("commit", f"{self.name}\n{parent}\n{title}\n{tree}".encode())
        self.commits[oid] = Commit(oid, dict(files), parent, title)
        return oid


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content)).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size >= LFS_BYTES or any(fnmatch(path, pattern) for pattern in LFS)
