"""`manifest.json` makes a directory a checkpoint, and is written last.

One JSON object whose last line is the digest of all bytes before that line. Every later schema keeps that rule, so a torn or
damaged manifest is never taken for a foreign or a newer one. `docs/` has the keys.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import blake3

from finetune.errors import CheckpointError
from finetune.plan.facts import Facts, Metrics, World, world_of
from finetune.store.run.directory import step_of
from finetune.store.run.records import AmendmentRecord, MemberRecord, ParentRecord
from finetune.store.strict_json import to_json
from finetune.store.tensors import TensorRecord

SCHEMA = 1
MANIFEST = "manifest.json"
_LAST_LINE = re.compile(rb'"digest": "(blake3:[0-9a-f]{64})"\}\n')
_HINT = "use another checkpoint of the run"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class ManifestError(CheckpointError):
    """An unusable manifest: `damaged` (or torn), `foreign` (another program's) or `future` (a newer version's)."""

    def __init__(self, reason: Literal["damaged", "foreign", "future"], message: str, *, where: str, hint: str):
        self.reason = reason
        super().__init__(message, where=where, hint=hint)


@dataclass(frozen=True)
class FileRecord:
    """The manifest's record of a file; safetensors files have a record for each tensor, in the order of the bytes."""

    bytes: int
    digest: str
    tensors: tuple[TensorRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's own account of itself.

    `parent` is {ref, digest of its manifest} or None; `metrics` are those of this step; `versions` and `world` are recorded facts.
    `digest` is None until the manifest is read from a file.
    """

    schema: int = SCHEMA
    run: str
    attempt: str
    step: int
    parent: ParentRecord | None
    plan_id: str
    kind: Literal["full", "weights", "average"] = "full"
    """`weights` was demoted: optimizer and counters are gone. `average` is a weighted sum of other checkpoints, and no step of a run."""
    demoted_from: str | None = None
    """Digest of its manifest before it was demoted: later checkpoints name it as their parent's."""
    amendments: list[AmendmentRecord] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    world: World = field(default_factory=World)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    members: list[MemberRecord] = field(default_factory=list)
    """What an average was taken over; only averages have this and the next one."""
    method: str = ""
    """The options of `finetune average` that chose members and weights."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    digest: str | None = field(default=None, compare=False)

    def to_bytes(self) -> bytes:
        """The file: one key a line, the digest last."""
        unused = {"digest"} if self.kind == "average" else {"digest", "members", "method"}
        entries = {key: value for key, value in asdict(self).items() if key not in unused}
        for record in entries["files"].values():
            if not record["tensors"]:
                del record["tensors"]
        body = "{" + "".join(f"{to_json(key)}: {to_json(value)},\n" for key, value in entries.items())
        return f'{body}"digest": "{_digest(body.encode())}"}}\n'.encode()


def parse(data: bytes, where: str) -> Manifest:
    """The manifest in a file's bytes; ManifestError tells damaged, foreign and future ones apart. Unknown keys are ignored."""
    last = data.rfind(b"\n", 0, len(data) - 1) + 1
    line = _LAST_LINE.fullmatch(data, last)
    if not line or line[1].decode() != _digest(data[:last]):
        if _is_another_programs(data):
            raise _foreign(where)
        raise ManifestError("damaged", "the manifest is torn or damaged", where=where, hint=_HINT)
    entries = json.loads(data)
    schema = entries.get("schema")
    if type(schema) is int and schema > SCHEMA:
        message = f"the checkpoint has format {schema} and was written by a newer version of finetune; this one reads up to {SCHEMA}"
        raise ManifestError("future", message, where=where, hint="update finetune")
    if schema != SCHEMA or not _REQUIRED <= entries.keys():
        raise _foreign(where)
    try:
        known = {key: entries[key] for key in _KEYS & entries.keys()}
        return Manifest(
            **known | {"files": {check_name(name): _file(record) for name, record in entries["files"].items()}}
        )
    except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as error:
        raise _foreign(where) from error


_KEYS = {item.name for item in fields(Manifest)}
_REQUIRED = {"run", "attempt", "step", "parent", "plan_id", "files"}


def of_attempt(facts: Facts, plan_id: str, attempt: str, step: int = 0, parent: ParentRecord | None = None) -> Manifest:
    """The manifest of an attempt at a run with these facts; each checkpoint adds the facts of its step."""
    return Manifest(
        run=facts["run"],
        attempt=attempt,
        step=step,
        parent=parent,
        plan_id=plan_id,
        versions=facts["versions"],
        world=world_of(facts),
    )


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a sound manifest; `verify` checks its other files."""

    path: Path
    step: int
    manifest: Manifest


def read(path: Path) -> Checkpoint:
    """The checkpoint in any directory; ManifestError if the manifest is missing, damaged, foreign or from the future."""
    where = str(path / MANIFEST)
    try:
        manifest = parse((path / MANIFEST).read_bytes(), where)
    except OSError as error:
        raise ManifestError("damaged", cannot_be_read(error), where=where, hint=_HINT) from error
    if step_of(path.name) not in (None, manifest.step):
        raise ManifestError("damaged", f"is the manifest of step {manifest.step}", where=where, hint=_HINT)
    return Checkpoint(path, manifest.step, manifest)


def cannot_be_read(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def check_name(name: str) -> str:
    """Checks the name of a checkpoint's file: it must not leave the directory, or be the manifest itself."""
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(
            f"`{name}` cannot be the name of a file of a checkpoint", hint="letters, digits and `_.+-`, no folders"
        )
    return name


def _digest(data: bytes) -> str:
    return f"blake3:{blake3.blake3(data).hexdigest()}"


def _file(entry: dict[str, Any]) -> FileRecord:
    tensors = entry.get("tensors", ())
    records = tuple(TensorRecord(item["name"], item["dtype"], tuple(item["shape"]), item["digest"]) for item in tensors)
    if sum(record.bytes for record in records) > entry["bytes"]:
        raise ValueError("the tensors are larger than their file")
    return FileRecord(entry["bytes"], entry["digest"], records)


def _is_another_programs(data: bytes) -> bool:
    """Whether these bytes are JSON, but never were a manifest of ours."""
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return not isinstance(entries, dict) or not {"schema", "plan_id", "files"} <= entries.keys()


def _foreign(where: str) -> ManifestError:
    return ManifestError(
        "foreign", "the manifest is not one of finetune's", where=where, hint="name a checkpoint of a run"
    )
