"""One run a mirror, and one writer at a time: the object `mirror.json` names both.

Object stores have no locks. A writer looks at the object right before each record and each deletion, and stops once it names another
one. A new writer waits until the one before has had time to look.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import blake3

from finetune.errors import MirrorError
from finetune.store.boot import boot_id
from finetune.store.mirror.bucket import Bucket
from finetune.store.strict_json import to_json

SCHEMA = 1
OWNER = "mirror.json"
GRACE_SECONDS = 60.0


class UnusableError(MirrorError):
    """The mirror is not for this run as it is here: to wait does not help."""


class TakenOverError(MirrorError):
    """Another process writes this mirror now."""


@dataclass(frozen=True)
class Owner:
    run: str
    name: str
    """Of the run directory."""
    token: str
    host: str
    here: str | None
    """Stands for the run directory, in this boot of this host; None if the system does not name its boots."""
    since: str
    is_released: bool = False
    schema: int = SCHEMA

    def __str__(self) -> str:
        return f"{self.host} since {self.since}"


def read(bucket: Bucket) -> Owner | None:
    """None if the mirror is new. MirrorError if the object is not one of ours."""
    content = bucket.read(OWNER)
    if content is None:
        return None
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        hint = "name an empty prefix, or upgrade finetune"
        raise UnusableError(f"has an object {OWNER} that is not of a mirror", where=bucket.place, hint=hint) from None


def refuse_other(bucket: Bucket, run: str, name: str) -> Owner | None:
    """The owner; MirrorError if this is the mirror of another run."""
    owner = read(bucket)
    if owner and owner.run != run:
        hint = f"resume that run with `--run …/{owner.name}`, or give this one another place: `mirror.to` may contain {{run}}"
        raise UnusableError(
            f"is the mirror of another run, {owner.name} ({owner.run}), not of {name}", where=bucket.place, hint=hint
        )
    return owner


class Writer:
    """The right to write a mirror, until another process takes it."""

    def __init__(self, bucket: Bucket, run: str, path: Path, since: str):
        self.bucket = bucket
        host, boot = socket.gethostname(), boot_id()
        here = blake3.blake3(f"{host} {boot} {path.resolve()}".encode()).hexdigest() if boot else None
        self.owner = Owner(run, path.absolute().name, secrets.token_hex(8), host, here, since)

    def claim(self) -> Owner | None:
        """Writes the owner, and returns the one before. MirrorError if this is the mirror of another run, or cannot be written."""
        before = refuse_other(self.bucket, self.owner.run, self.owner.name)
        self._put(self.owner, f"Write from {self.owner.host}")
        return before

    def take(self, say: Callable[[str], object]) -> None:
        """The same, and waits for the writer before. Call it under the run directory's own lock: then one of this directory has ended."""
        before = self.claim()
        is_here = before is not None and before.here is not None and before.here == self.owner.here
        if before and not before.is_released and not is_here:
            say(f"taking over from {before}; waiting {GRACE_SECONDS:.0f} s until it has noticed")
            time.sleep(GRACE_SECONDS)
        self.check()

    def check(self) -> None:
        """TakenOverError if another process has taken the mirror; right before a record is written, or objects are removed."""
        owner = read(self.bucket)
        if owner is None or owner.token != self.owner.token:
            taker = owner or f"somebody who removed {OWNER}"
            hint = "commits of this host are no longer mirrored; `finetune mirror RUN` takes the mirror back"
            raise TakenOverError(f"was taken over by {taker}", where=self.bucket.place, hint=hint)

    def release(self) -> None:
        """The next writer need not wait. Call it when nothing will be written or removed any more."""
        self.check()
        self._put(replace(self.owner, is_released=True), "Finish writing")

    def _put(self, owner: Owner, title: str) -> None:
        self.bucket.put(OWNER, f"{to_json(asdict(owner))}\n".encode())
        self.bucket.settle(title)
