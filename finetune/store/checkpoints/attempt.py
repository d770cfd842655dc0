"""A running save: hashes files while it writes them, and syncs them, outside the checkpoints' directory."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from finetune.errors import CheckpointError
from finetune.store import tensors as safetensors
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.assembled import Part
from finetune.store.checkpoints.manifest import FileRecord, check_name
from finetune.store.durable import HashedFile, durable, failures
from finetune.store.strict_json import to_json
from finetune.store.tensors import PIECE_BYTES, Tensor, pieces

NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP}


class Ranks(Protocol):
    """The other processes that write rows of the files of a save."""

    def ask(self, path: Path) -> None:
        """Has each write its rows of a file that has its size."""

    def answers(self) -> Mapping[int, Sequence[Part]]:
        """What each wrote. CheckpointError where one could not."""


class Attempt:
    """A running save, in a directory that is not a checkpoint yet. An error removes the directory; begin another attempt."""

    def __init__(self, path: Path, step: int, ranks: Ranks | None = None):
        self.path = path
        self.step = step
        self.files: dict[str, FileRecord] = {}
        self.linked: set[str] = set()
        """Those of them that an earlier checkpoint had."""
        self.ranks = ranks
        self._assembled: set[str] = set()

    @property
    def unread(self) -> set[str]:
        """The files that were written, and have not been read back."""
        return self.files.keys() - self.linked - self._assembled

    @property
    def written_bytes(self) -> int:
        return sum(record.bytes for name, record in self.files.items() if name not in self.linked)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self._create(name) as file:
            for piece in pieces(data):
                file.write(piece)

    def write_json(self, name: str, value: object) -> None:
        self.write_bytes(name, f"{to_json(value)}\n".encode())

    def write_tensors(self, name: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> None:
        if self.ranks:
            self._assemble(name, tensors, metadata, self.ranks)
            return
        with self._create(name) as file:
            file.tensors = tuple(safetensors.write(file, tensors, metadata))

    def link(self, name: str, source: Path, record: FileRecord) -> None:
        """An identical file of an earlier checkpoint: hard-linked, or copied (and compared) where links are impossible."""
        check_name(name)
        with self.saving(self.path / name):
            try:
                os.link(source, self.path / name)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
            else:
                self.files[name] = record
                self.linked.add(name)
                return
        with self._create(name) as file, source.open("rb", buffering=0) as original:
            file.tensors = record.tensors
            shutil.copyfileobj(original, file, PIECE_BYTES)
        if self.files[name] != record:
            self.discard()
            raise CheckpointError(
                "the file changed since it was committed", where=str(source), hint="see `finetune verify`"
            )

    def discard(self) -> None:
        """Removes the directory as far as the disk allows; the next holder of the lease sweeps the rest."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def saving(self, path: Path) -> Iterator[None]:
        """If a step of the save fails, removes the whole attempt: after a failed fsync it is unknown which bytes are on the disk
        (https://lwn.net/Articles/752063)."""
        try:
            with failures(path):
                yield
        except CheckpointError:
            self.discard()
            raise

    def _assemble(self, name: str, tensors: Sequence[Tensor], metadata: dict[str, str], ranks: Ranks) -> None:
        """A file of which every rank writes its rows. It is read back at once: that gives its digest."""
        path = self.path / check_name(name)
        with self.saving(path):
            made = assembled.layout(tensors, metadata)
            assembled.create(path, made)
            ranks.ask(path)
            try:
                own = assembled.write_rows(path, made)
            finally:
                # Heard whatever happens here: an answer that is left would be taken for one about the next save.
                others = ranks.answers()
            self.files[name] = assembled.finished(path, made, {0: own, **others})
        self._assembled.add(name)

    @contextmanager
    def _create(self, name: str) -> Iterator["HashedFile"]:
        path = self.path / check_name(name)
        with self.saving(path), durable(path) as file:
            yield file
        self.files[name] = FileRecord(file.bytes, file.digest(), file.tensors)
