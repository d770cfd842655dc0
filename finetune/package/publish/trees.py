"""Trees of files, as the Hub describes one and as a package is one: their differences, sizes and digests."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.package.verify.contents import sha256


@dataclass(frozen=True)
class Stored:
    """A file of a tree, as the Hub describes it."""

    size: int
    oid: str
    """Of the git blob."""
    sha256: str | None
    """Of the content, if LFS or Xet stores it."""

    def is_same(self, content: Path | bytes) -> bool:
        if size_of(content) != self.size:
            return False
        if self.sha256:
            return sha256_of(content) == self.sha256
        content = content if isinstance(content, bytes) else content.read_bytes()  # files kept by git itself are small
        return hashlib.sha1(b"blob %d\0%s" % (self.size, content)).hexdigest() == self.oid


Tree = Mapping[str, Stored]
Files = Mapping[str, Path | bytes]


def differences(tree: Tree, files: Files, gone: Collection[str] = ()) -> dict[str, Path | bytes | None]:
    """The changes that give a tree these files and remove the old ones; None means remove."""
    changed = {name: content for name, content in files.items() if name not in tree or not tree[name].is_same(content)}
    return changed | dict.fromkeys(name for name in gone if name in tree)


def digest(files: Files) -> str:
    """SHA-256 over names and contents, so the same package has the same staging branch."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name}\0{sha256_of(content)}\n".encode())
    return whole.hexdigest()


def size_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def sha256_of(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
