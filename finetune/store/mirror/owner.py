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

from finetune.errors import MirrorError
from finetune.store.boot import boot_id
from finetune.store.mirror.bucket import Bucket
from finetune.store.strict_json import to_json

SCHEMA = 1
OWNER = "mirror.json"
GRACE_SECONDS = 60.0
LOOKED_SECONDS = 20.0
"""How long a look counts; less than the grace by more than a request takes."""


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
    boot_id: str | None
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

    def __init__(self, bucket: Bucket, run: str, name: str, since: str):
        self.bucket = bucket
        self._looked = 0.0
        self.owner = Owner(run, name, secrets.token_hex(8), socket.gethostname(), boot_id(), since)

    def claim(self) -> Owner | None:
        """Writes the owner, and returns the one before. MirrorError if this is the mirror of another run, or cannot be written."""
        before = refuse_other(self.bucket, self.owner.run, self.owner.name)
        self._put(self.owner, f"Write from {self.owner.host}")
        return before

    def take(self, say: Callable[[str], object]) -> None:
        """The same, and waits for the writer before. Call it under the run directory's own lock: then one of this boot of this host
        has ended."""
        before = self.claim()
        here = (self.owner.host, self.owner.boot_id)
        if before and not before.is_released and ((before.host, before.boot_id) != here or None in here):
            say(f"taking over from {before}; waiting {GRACE_SECONDS:.0f} s until it has noticed")
            time.sleep(GRACE_SECONDS)
        self.check()

    def check(self) -> None:
        """TakenOverError if another process has taken the mirror; right before a record is written."""
        owner = read(self.bucket)
        if owner is None or owner.token != self.owner.token:
            taker = owner or f"somebody who removed {OWNER}"
            hint = "commits of this host are no longer mirrored; `finetune mirror RUN` takes the mirror back"
            raise TakenOverError(f"was taken over by {taker}", where=self.bucket.place, hint=hint)
        self._looked = time.monotonic()

    def check_lately(self) -> None:
        """The same, unless that was seconds ago; right before each deletion."""
        if time.monotonic() - self._looked > LOOKED_SECONDS:
            self.check()

    def release(self) -> None:
        """The next writer need not wait. Call it when nothing will be written or removed any more."""
        self.check()
        self._put(replace(self.owner, is_released=True), "Finish writing")

    def _put(self, owner: Owner, title: str) -> None:
        self.bucket.put(OWNER, f"{to_json(asdict(owner))}\n".encode())
        self.bucket.settle(title)
