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
from finetune.store.checkpoints.assembled import Digests, Layout, Part, Written
from finetune.store.checkpoints.manifest import FileRecord, check_name
from finetune.store.durable import HashedFile, durable, failures
from finetune.store.strict_json import to_json
from finetune.store.tensors import PIECE_BYTES, Tensor, pieces

NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP}


Contents = tuple[Sequence[Tensor], dict[str, str]]
"""Of a safetensors file: tensors and metadata."""


class Ranks(Protocol):
    """The other processes, which write rows of the files of a save and read files back."""

    def shared_out(self, sizes: Mapping[str, int]) -> Mapping[int, Sequence[str]]:
        """The files that each rank reads back; this process is rank 0."""

    def ask_to_write(self, directory: Path, names: Sequence[str]) -> None:
        """Has each write its rows of files that have their size."""

    def written(self) -> Mapping[int, Mapping[str, Sequence[Part]]]:
        """What each wrote of each file. CheckpointError where one could not."""

    def ask_to_read(self, directory: Path, files: Mapping[int, Mapping[str, Written]]) -> None:
        """Has each read these files back."""

    def read(self) -> Mapping[str, Digests]:
        """What they found. CheckpointError where one could not, or found other bytes."""


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

    def write_files(self, files: Mapping[str, Contents]) -> None:
        """Safetensors files, of which other ranks may have the rest of the rows. Then they are read back at once: that gives their
        digests."""
        if self.ranks:
            self._assemble(files, self.ranks)
            return
        for name, contents in files.items():
            self.write_tensors(name, *contents)

    def write_tensors(self, name: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> None:
        """A file of which this process has all."""
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

    def _assemble(self, files: Mapping[str, Contents], ranks: Ranks) -> None:
        """Files of which every rank writes its rows, and then every rank reads some of them back."""
        paths = {name: self.path / check_name(name) for name in files}
        with self.saving(self.path):
            made = {name: assembled.layout(*contents) for name, contents in files.items()}
            for name, path in paths.items():
                assembled.create(path, made[name])
            ranks.ask_to_write(self.path, list(files))
            try:
                own = {name: assembled.write_rows(path, made[name]) for name, path in paths.items()}
            finally:
                # Heard whatever happens here: an answer that is left would be taken for one about the next save.
                parts = ranks.written()
            of_all = {0: own, **parts}
            rows = {name: {rank: each[name] for rank, each in of_all.items()} for name in files}
            whole = {name: assembled.written(paths[name], made[name], rows[name]) for name in files}
            found = self._read_back(whole, made, ranks)
            for name, path in paths.items():
                self.files[name] = assembled.finished(path, made[name], found[name])
        self._assembled |= files.keys()

    def _read_back(
        self, whole: Mapping[str, Written], made: Mapping[str, Layout], ranks: Ranks
    ) -> Mapping[str, Digests]:
        """Every rank whole files: of most of their rows it reads what others wrote, on other hosts perhaps."""
        shares = ranks.shared_out({name: each.starts[-1] for name, each in made.items()})
        own = shares.get(0, [])
        ranks.ask_to_read(
            self.path, {rank: {name: whole[name] for name in names} for rank, names in shares.items() if rank}
        )
        try:
            found = {name: assembled.read_back(self.path / name, made[name], whole[name].parts) for name in own}
        finally:
            others = ranks.read()
        return {**found, **others}

    @contextmanager
    def _create(self, name: str) -> Iterator["HashedFile"]:
        path = self.path / check_name(name)
        with self.saving(path), durable(path) as file:
            yield file
        self.files[name] = FileRecord(file.bytes, file.digest(), file.tensors)
