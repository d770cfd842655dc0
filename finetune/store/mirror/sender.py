"""Sends the commits of a run to its mirror, and removes there what the mirror's own rules do not keep.

Pieces first, then the record of the commit; removal in the other order, and only after a newer record is there. A cut at any byte
leaves records that are whole, and pieces that the next round finds.
"""

from collections.abc import Callable
from pathlib import Path

from finetune.errors import MirrorError
from finetune.plan.retention import Saved, keep
from finetune.recipe.schema import Mirror
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.stored import Summary
from finetune.store.mirror import commit
from finetune.store.mirror.bucket import Alive, Bucket
from finetune.store.mirror.commit import DamagedHereError
from finetune.store.mirror.owner import Writer
from finetune.store.mirror.pieces import Sending
from finetune.store.mirror.pulled import records
from finetune.store.mirror.records import COMMITS, PIECES, CommitRecord, digest_of, piece_name, place_of
from finetune.store.run import journal, scan
from finetune.store.run.directory import RunDirectory

BATCH = 100
"""Objects that are removed after one look at the owner."""


class Sender:
    """The mirror of one run, as its only writer knows it. After a MirrorError make another one: it reads the bucket again."""

    def __init__(self, run: Path, rules: Mirror, writer: Writer, say: Callable[[str], object], alive: Alive):
        self._run = RunDirectory(run)
        self._rules = rules
        self._writer = writer
        self._bucket: Bucket = writer.bucket
        self._say = say
        self._alive = alive
        self._store = Store(run)
        self._by = rules.keep.best or self._run.plan()[0].recipe.checkpoint.keep.chosen_by
        self._records: dict[int, CommitRecord] = {}
        """The newest of each step in the mirror."""
        for record in records(self._bucket, writer.owner.run, say):
            self._records.setdefault(record.step, record)
            alive()
        there = {name: place for name in self._bucket.sizes(COMMITS) if (place := place_of(name))}
        self._number = max((number for _, number in there.values()), default=0)
        self._superseded = there.keys() - {record.object_name for record in self._records.values()}
        """Records of steps that have a newer one, and damaged ones."""
        self._sizes = self._bucket.sizes(PIECES)
        self._seen: dict[int, str] = {}
        """Of each local commit that is mirrored or damaged, what changes with its manifest."""
        self._damaged: dict[int, str] = {}
        """The same of those that are damaged here."""
        self._read: commit.Seen = {}
        self._is_tidy = False

    @property
    def steps(self) -> list[int]:
        """Those in the mirror."""
        return sorted(self._records)

    def round(self, is_last: bool) -> list[int]:
        """Sends what is due now, the newest commit first, and tidies up. Returns the steps it sent."""
        sent = []
        for step in self._given_up():
            self._superseded |= {self._records.pop(step).object_name}
        while due := self._missing(is_last):
            step = max(item.step for item in due)
            try:
                if self._send(step):
                    sent.append(step)
                    self._say(f"mirrored step {step}")
            except DamagedHereError as error:
                self._damaged[step] = commit.sign_of(self._run.checkpoint(step))
                self._say(f"{error.message}; it is not mirrored")
        if sent or not self._is_tidy:
            self._remove()
        return sent

    def lacks(self) -> list[int]:
        """The local commits that belong into the mirror and are not there."""
        self._damaged = {}
        return sorted(item.step for item in self._missing(True))

    def _missing(self, is_last: bool) -> list[Summary]:
        """The local commits to send now: those that the rules would keep, among them and what is in the mirror."""
        local = {item.step: item for item in self._store.summaries()}
        newest, every = max(local, default=0), self._rules.every.steps if self._rules.every else None
        due = {
            step: item
            for step, item in local.items()
            if every is None or step % every == 0 or (is_last and step == newest)
        }
        kept = self._kept(due)
        return [item for step, item in due.items() if step in kept and not self._is_settled(item)]

    def _kept(self, local: dict[int, Summary]) -> set[int]:
        saved = {
            record.step: Saved(record.step, record.metrics, record.kind == "full", self._by)
            for record in self._records.values()
        }
        # A full commit in the mirror stays one if only weights are left of it here.
        saved |= {
            step: Saved.of(item, {}, self._by)
            for step, item in local.items()
            if step not in saved or item.kind == "full"
        }
        kept = keep(list(saved.values()), self._rules.keep, protected=self._store.pinned())
        return kept.full | kept.weights

    def _is_settled(self, item: Summary) -> bool:
        """Whether there is nothing to send of a local commit."""
        sign = commit.sign_of(item.path)
        if sign in ("", self._seen.get(item.step), self._damaged.get(item.step)):
            return True
        record = self._records.get(item.step)
        if record is None:
            return False
        manifest = item.path / MANIFEST
        try:
            digest = digest_of(manifest.read_bytes())
        except FileNotFoundError:  # removed at this moment
            return True
        is_same = record.files[commit.name_of(self._run, manifest)].digest == digest
        is_settled = is_same or (record.kind == "full" and item.kind != "full")
        if is_settled:
            self._seen[item.step] = sign
        return is_settled

    def _send(self, step: int) -> bool:
        """Whether the commit is in the mirror now: it may have been removed here meanwhile."""
        sign = commit.sign_of(self._run.checkpoint(step))
        sending = Sending(self._bucket, self._sizes, self._alive)
        try:
            read = commit.send(self._run, step, sending, self._records.values(), self._read)
            sending.finish()
        finally:
            sending.close()
        if read is None:
            return False
        manifest, files = read
        self._bucket.settle(f"Send the pieces of step {step}")
        self._number += 1
        owner = self._writer.owner
        record = CommitRecord(
            run=owner.run,
            name=owner.name,
            number=self._number,
            step=step,
            kind=manifest.kind,
            metrics=manifest.metrics,
            created=manifest.created,
            files=files,
        )
        self._refuse_incomplete(record)
        self._writer.check()
        self._bucket.put(record.object_name, record.to_bytes())
        self._bucket.settle(f"Mirror step {step}")
        self._alive()
        if before := self._records.get(step):
            self._superseded |= {before.object_name}
        self._records[step], self._seen[step] = record, sign
        return True

    def _refuse_incomplete(self, record: CommitRecord) -> None:
        """Asks the bucket itself: another process may have removed a piece that was there."""
        self._sizes = self._bucket.sizes(PIECES)
        for file in record.files.values():
            found = [self._sizes.get(piece_name(piece)) for piece in file.pieces]
            if None in found or sum(size or 0 for size in found) != file.bytes:
                message = f"step {record.step} is not whole there after it was sent"
                raise MirrorError(message, where=self._bucket.place, hint="send it again")

    def _remove(self) -> None:
        """Records first: what no record names can then go."""
        kept = self._kept({})
        doomed = [record for record in self._records.values() if record.step not in kept]
        self._remove_objects({*self._superseded, *(record.object_name for record in doomed)}, "commits")
        self._superseded = set()
        for record in doomed:
            del self._records[record.step]
        named = {piece_name(piece) for record in self._records.values() for piece in record.pieces}
        self._remove_objects(self._sizes.keys() - named, "pieces that no commit names")
        self._sizes = {name: size for name, size in self._sizes.items() if name in named}
        self._is_tidy = True

    def _remove_objects(self, names: set[str], what: str) -> None:
        ordered = sorted(names)
        for start in range(0, len(ordered), BATCH):
            self._writer.check()
            self._bucket.remove(ordered[start : start + BATCH])
            self._alive()
        if ordered:
            self._bucket.settle(f"Remove {what}")

    def _given_up(self) -> set[int]:
        """The steps in the mirror that a rollback took back after they were committed."""
        newest = max((item.step for item in self._store.summaries()), default=0)
        later = [record for record in self._records.values() if record.step > newest]
        rollbacks = [each for each in scan.events(self._run.path) if journal.is_rollback(each)] if later else []
        return {
            record.step
            for record in later
            if any(each["first"] <= record.step and each["time"] > record.created for each in rollbacks)
        }
