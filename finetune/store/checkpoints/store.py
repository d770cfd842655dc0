"""The checkpoints of a run on disk: staged, committed by one rename, verified, removed.

The protocol: every file is hashed while written and synced; the attempt's directory is synced; `manifest.json` is written and synced;
the directory is synced again and renamed into `checkpoints/`; that rename, synced, is the commit. An error or a kill before it leaves
an attempt; no code reads those. Only the holder of the run's `lease` writes.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from finetune.errors import CheckpointError
from finetune.store.checkpoints.attempt import Attempt, Ranks
from finetune.store.checkpoints.manifest import MANIFEST, Checkpoint, Manifest, read
from finetune.store.checkpoints.stored import Summary, Unreadable, is_whole, opened
from finetune.store.checkpoints.tensor_files import is_for_resume
from finetune.store.checkpoints.verify import Damage, Verify, verify
from finetune.store.durable import durable, failures, make_directory, rename, replace_file, sync_directory
from finetune.store.run.directory import RunDirectory, step_of
from finetune.store.tensors import pieces


class Store:
    """The checkpoints of one run."""

    def __init__(self, run: Path):
        self.run = run
        self._paths = RunDirectory(run)
        self.directory = self._paths.checkpoints
        self._summaries: dict[str, tuple[tuple[int, ...], Summary | None]] = {}

    def begin(self, step: int, attempt_id: str, ranks: Ranks | None = None) -> Attempt:
        path = self._paths.attempt(step, attempt_id, secrets.token_hex(4))
        attempt = Attempt(path, step, ranks)
        with attempt.saving(path):
            make_directory(self.directory)
            make_directory(path.parent)
            path.mkdir()
        return attempt

    def commit(self, attempt: Attempt, manifest: Manifest, check: Callable[[], None] | None = None) -> Checkpoint:
        """Makes an attempt a checkpoint. Takes `manifest.files` from the attempt; calls `check` right before, and it may raise.

        Replaces a damaged or demoted checkpoint of the same step. A sound one is an error: commits do not change.
        """
        if manifest.step != attempt.step:
            raise ValueError(f"a manifest of step {manifest.step} for an attempt at step {attempt.step}")
        destination = self._paths.checkpoint(attempt.step)
        with attempt.saving(destination):
            self._refuse_sound(destination)
            sync_directory(attempt.path)
            with durable(attempt.path / MANIFEST) as file:
                for piece in pieces(replace(manifest, files=attempt.files).to_bytes()):
                    file.write(piece)
            sync_directory(attempt.path)
            if check:
                check()
            replaced = self._to_trash(destination) if destination.exists() else None
            try:
                rename(attempt.path, destination)
            except OSError:
                if replaced:
                    os.rename(replaced, destination)
                raise
        if replaced:
            with failures(replaced):
                shutil.rmtree(replaced)
        return read(destination)

    def read_back(self, checkpoint: Checkpoint, written: Collection[str]) -> None:
        """Reads back and compares every written byte of a save; CheckpointError if one differs. Call it before removing anything."""
        if damage := verify(checkpoint.path, only=written, is_from_disk=True):
            hint = "this disk cannot be trusted: use another one; earlier checkpoints were not touched"
            message = f"does not read back as it was written: {damage[0].file}: {damage[0].message}"
            raise CheckpointError(message, where=str(checkpoint.path), hint=hint)

    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints with a sound manifest, by step."""
        return [item for item in self._scan() if isinstance(item, Checkpoint)]

    def summaries(self) -> list[Summary]:
        """Short records of the same. Reads a manifest again only if it has changed: a run may keep hundreds."""
        known = {}
        for name in self._names():
            path = self.directory / name
            try:
                status = (path / MANIFEST).stat()
            except OSError:  # what is wrong there is for `unreadable` to say
                continue
            sign = (status.st_ino, status.st_mtime_ns, status.st_size)
            known[name] = self._summaries.get(name, ((), None))
            if known[name][0] != sign:
                item = opened(path)
                known[name] = (sign, Summary.of(item) if isinstance(item, Checkpoint) else None)
        self._summaries = known
        return [summary for _, summary in known.values() if summary]

    def unreadable(self) -> list[Unreadable]:
        """Directories in a checkpoint's place without a sound manifest, by step."""
        return [item for item in self._scan() if isinstance(item, Unreadable)]

    def find(self, step: int) -> Checkpoint:
        """The checkpoint of a step; else a CheckpointError with the reason and the existing steps."""
        path = self._paths.checkpoint(step)
        if path.is_dir():
            return read(path)
        steps = ", ".join(str(item.step) for item in self.checkpoints())
        hint = "name one of these steps, `last` or `best`" if steps else "`finetune train` commits checkpoints"
        raise CheckpointError(f"{self.run} has no step {step}; committed: {steps or 'none'}", hint=hint)

    def newest_sound(
        self, before: int | None = None, verify: Verify = verify
    ) -> tuple[Checkpoint | None, list[Damage]]:
        """The newest full checkpoint with every byte intact, and the damage in newer ones (`file` begins with `step-…/`). `before` a step
        if you give one."""
        damages: list[Damage] = []
        for name in reversed(self._names()):  # a manifest at a time: there may be hundreds of older ones
            item = opened(self.directory / name)
            if before is not None and item.step >= before:
                continue
            if isinstance(item, Unreadable) and item.damage.check in ("foreign", "future"):
                hint = (
                    "update finetune"
                    if item.damage.check == "future"
                    else "move it out of the run, or use another --run"
                )
                raise CheckpointError(item.damage.message, where=str(item.path), hint=hint)
            if isinstance(item, Checkpoint) and item.manifest.kind != "full":
                continue
            # A stray file is no reason to lose steps: nothing reads it.
            found = [damage for damage in verify(item.path) if damage.check != "extra"]
            if isinstance(item, Checkpoint) and not found:
                return item, damages
            damages += [replace(damage, file=f"{item.path.name}/{damage.file}") for damage in found]
        return None, damages

    def remove(self, checkpoint: Checkpoint | Summary | Unreadable) -> None:
        """Renames a checkpoint away in one call, then deletes it: a crash in between leaves no half of it in place."""
        with failures(checkpoint.path):
            trash = self._to_trash(checkpoint.path)
            sync_directory(self.directory)
            shutil.rmtree(trash)

    def demote(self, checkpoint: Checkpoint) -> Checkpoint:
        """Keeps only the model of a checkpoint. Renaming the new manifest over the old one decides; after a crash right then, `sweep`
        removes the unlisted files."""
        files = {name: record for name, record in checkpoint.manifest.files.items() if not is_for_resume(name)}
        demoted = replace(checkpoint.manifest, kind="weights", demoted_from=checkpoint.manifest.digest, files=files)
        with failures(checkpoint.path):
            replace_file(checkpoint.path / MANIFEST, demoted.to_bytes())
        self._remove_resume_files(checkpoint.path)
        return read(checkpoint.path)

    def _remove_resume_files(self, path: Path) -> None:
        with failures(path):
            for file in path.iterdir():
                if is_for_resume(file.name):
                    file.unlink()

    def pin(self, step: int, reason: str) -> None:
        """Protects the checkpoint of a step from the keep rules, by the file `pins/step-<step>-<reason>`. Users may read and remove it."""
        path = self._paths.pin(step, reason)
        with failures(path):
            make_directory(path.parent)
            replace_file(path, b"")

    def is_pinned(self, step: int, reason: str) -> bool:
        return self._paths.pin(step, reason).exists()

    def pinned(self) -> set[int]:
        """The pinned steps, committed or not."""
        return set(self._paths.pinned())

    def sweep(self) -> None:
        """Puts back a checkpoint that a dead process moved away without a commit in its place. Removes its leftovers in `attempts/`, in
        `trash/`, and of demotions. Only the holder of the lease may call it, before its first save."""
        self._put_back()
        for directory in (self._paths.attempts, self._paths.trash):
            with failures(directory):
                for path in directory.iterdir() if directory.is_dir() else ():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
        for checkpoint in self.checkpoints():
            with failures(checkpoint.path):
                for left in checkpoint.path.glob("*.tmp"):
                    left.unlink()
            if checkpoint.manifest.kind == "weights":
                self._remove_resume_files(checkpoint.path)

    def _put_back(self) -> None:
        for path in sorted(self._paths.trashed()):
            destination = self.directory / path.name.rpartition("-")[0]
            # what is whole was moved, and nothing of it deleted yet; a removal that is put back is removed again
            if not destination.exists() and is_whole(path):
                with failures(path):
                    rename(path, destination)

    def _names(self) -> list[str]:
        with failures(self.directory, what="cannot read"):
            names = sorted(os.listdir(self.directory)) if self.directory.is_dir() else []
        return [name for name in names if step_of(name) is not None]

    def _scan(self) -> list[Checkpoint | Unreadable]:
        return [opened(self.directory / name) for name in self._names()]

    def _refuse_sound(self, destination: Path) -> None:
        if not destination.exists():
            return
        is_demoted = isinstance(there := opened(destination), Checkpoint) and there.manifest.kind != "full"
        if not is_demoted and {damage.check for damage in verify(destination)} <= {"extra", "foreign", "future"}:
            hint = "a committed checkpoint does not change: remove it first, or use another run directory"
            raise CheckpointError("this step is committed already", where=str(destination), hint=hint)

    def _to_trash(self, path: Path) -> Path:
        trash = self._paths.trash / f"{path.name}-{secrets.token_hex(4)}"
        make_directory(trash.parent)
        os.rename(path, trash)
        return trash
