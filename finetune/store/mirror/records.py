"""What a mirror says of one commit: every file of the run as it was then, in pieces that are named by their content.

A record is written after all of its pieces, never changes, and ends with a digest of itself. A torn one is never taken for whole.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import blake3

from finetune.errors import MirrorError
from finetune.plan.facts import Metrics
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.run.directory import CHECKPOINTS, JOURNAL, PLAN, step_name, step_of
from finetune.store.strict_json import to_json

SCHEMA = 1
PIECES, COMMITS = "blobs", "commits"
_NAME = re.compile(rf"{COMMITS}/(?P<step>step-\d{{8}})-(?P<number>\d{{8}})\.json")
_HEX = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_LAST_LINE = re.compile(rb'"digest": "(blake3:[0-9a-f]{64})"\}\n')


class DamagedError(MirrorError):
    """An object of a mirror is missing, or is not what was written."""

    def __init__(self, message: str, *, where: str, object_name: str | None = None):
        self.object_name = object_name
        """The piece with other bytes than its name says."""
        super().__init__(message, where=where)


@dataclass(frozen=True)
class MirroredFile:
    bytes: int
    digest: str
    """Of the whole file, like `blake3:…`."""
    pieces: tuple[str, ...]
    """The BLAKE3 of each, in order; together they are the file."""


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """A commit in a mirror."""

    schema: int = SCHEMA
    run: str
    """The run's id."""
    name: str
    """The run directory's name."""
    number: int
    """Counts the records of a mirror: of one step, the greatest is the newest."""
    step: int
    kind: str
    """As in the checkpoint's manifest, like the next two."""
    metrics: Metrics
    created: str
    files: dict[str, MirroredFile]
    """By the path in the run directory: the checkpoint of this step, and the rest of the run as it was then."""

    @property
    def object_name(self) -> str:
        return f"{COMMITS}/{step_name(self.step)}-{self.number:08d}.json"

    @property
    def pieces(self) -> set[str]:
        return {piece for file in self.files.values() for piece in file.pieces}

    def to_bytes(self) -> bytes:
        body = "{" + "".join(f"{to_json(key)}: {to_json(value)},\n" for key, value in asdict(self).items())
        return f'{body}"digest": "{digest_of(body.encode())}"}}\n'.encode()


def piece_name(digest: str) -> str:
    """The object of a piece. In 256 folders, because some stores are slow with many objects in one; `.bin`, because the Hub keeps such
    files outside of Git."""
    return f"{PIECES}/{digest[:2]}/{digest}.bin"


def digest_of(content: bytes) -> str:
    return f"blake3:{blake3.blake3(content).hexdigest()}"


def place_of(object_name: str) -> tuple[int, int] | None:
    """The step and the number of the record in an object; None for any other object."""
    match = _NAME.fullmatch(object_name)
    step = step_of(match["step"]) if match else None
    return (step, int(match["number"])) if match and step is not None else None


def parse(content: bytes, where: str) -> CommitRecord:
    """MirrorError if the record is torn, damaged, hostile, or from a newer version of finetune."""
    last = content.rfind(b"\n", 0, len(content) - 1) + 1
    line = _LAST_LINE.fullmatch(content, last)
    if not line or line[1].decode() != digest_of(content[:last]):
        raise DamagedError("the record is torn or damaged", where=where)
    entries = json.loads(content)
    if entries.get("schema") != SCHEMA:
        raise MirrorError("was written by a newer version of finetune", where=where, hint="upgrade finetune")
    del entries["digest"]
    try:
        files = {name: MirroredFile(**file) for name, file in entries.pop("files").items()}
        files = {name: MirroredFile(file.bytes, file.digest, tuple(file.pieces)) for name, file in files.items()}
        record = CommitRecord(**entries, files=files)
    except (TypeError, AttributeError, KeyError) as error:
        raise DamagedError("is not a record of a mirror", where=where) from error
    if problem := next(_problems(record), None):
        raise DamagedError(f"is not a record of a mirror: {problem}", where=where)
    return record


def _problems(record: CommitRecord) -> Iterator[str]:
    """What would lead out of the run directory, or to other objects than pieces, and what is not there."""
    if "/" in record.name or record.name in ("", ".", ".."):
        yield f"it names the run {record.name}"
    for name in (PLAN, JOURNAL, f"{CHECKPOINTS}/{step_name(record.step)}/{MANIFEST}"):
        if name not in record.files:
            yield f"it has no {name}"
    for name, file in record.files.items():
        if not all(_PART.fullmatch(part) for part in name.split("/")):
            yield f"it names a file {name}"
        if not all(isinstance(piece, str) and _HEX.fullmatch(piece) for piece in file.pieces):
            yield f"it names pieces of {name} that are no digests"
