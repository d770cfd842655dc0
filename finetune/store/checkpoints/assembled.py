"""One safetensors file that several processes write, each its rows of every tensor. The bytes are those that one process would write.

The first process lays the file out. Any process reads it back at the end: no other way gives the digest of a whole file. It compares
the rows of each process with what that one says it wrote.
"""

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import xxhash

from finetune.errors import CheckpointError
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.durable import BUFFER_BYTES, O_DIRECT, is_on_nfs, open_uncached
from finetune.store.tensors import Tensor, TensorRecord, beginning, in_order, pieces

MADE, DONE = 0o644, 0o444


class UntrustedDiskError(CheckpointError):
    """The disk has other bytes than were written."""


class Part(NamedTuple):
    """Bytes of a file that one process wrote."""

    start: int
    end: int
    digest: str
    """xxh3-128 of them."""


class Layout(NamedTuple):
    """Where the tensors of a file are; the same in every process, because it follows from names, types and shapes."""

    head: bytes
    tensors: list[Tensor]
    """In the order of the bytes."""
    starts: list[int]
    """The first byte of each in the file, and the size of the file."""


class Written(NamedTuple):
    """What a process must know of a file that all have written, to read it back. JSON makes lists of it, and `again` undoes that."""

    tensors: list[tuple[str, str, tuple[int, ...]]]
    """Name, type and shape."""
    parts: list[tuple[Part, int]]
    """In the order of the bytes, each with its rank."""

    @classmethod
    def again(cls, tensors: Sequence[Any], parts: Sequence[Any]) -> "Written":
        shaped = [(name, dtype, tuple(shape)) for name, dtype, shape in tensors]
        return cls(shaped, [(Part(*part), rank) for part, rank in parts])

    def layout(self, metadata: dict[str, str]) -> Layout:
        return layout([Tensor(*each, b"") for each in self.tensors], metadata)


class Digests(NamedTuple):
    """What a process found when it read a file back."""

    file: str
    tensors: list[str]
    """In the order of the bytes."""


def layout(tensors: Sequence[Tensor], metadata: dict[str, str]) -> Layout:
    ordered = in_order(tensors)
    head = beginning(ordered, metadata)
    return Layout(head, ordered, list(accumulate((tensor.bytes for tensor in ordered), initial=len(head))))


def create(path: Path, made: Layout) -> None:
    """The file with its header, at its full size."""
    # Where a disk cannot reserve room, glibc reads what is there and writes a byte to each block (NFS before 4.2).
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MADE)
    try:
        _write(descriptor, made.head, 0)
        os.posix_fallocate(descriptor, 0, made.starts[-1])  # a full disk is noticed now
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_rows(path: Path, made: Layout) -> list[Part]:
    """Writes what this process has of each tensor, durably."""
    parts = []
    # Rows of two hosts may share a page. A host that has it in its cache may write all of it back, with the other's bytes as they were.
    # NFS sends direct writes byte by byte, wherever they begin (open(2), "NOTES"). Elsewhere hosts lock pages, or have their own disk.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (O_DIRECT if is_on_nfs(path) else 0))
    try:
        for tensor, start in zip(made.tensors, made.starts, strict=False):
            begin = end = start + tensor.first
            digest = xxhash.xxh3_128()
            for piece in pieces(tensor.data):
                _write(descriptor, piece, end)
                digest.update(piece)
                end += len(piece)
            if end > begin:
                parts.append(Part(begin, end, digest.hexdigest()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return parts


def written(path: Path, made: Layout, parts: Mapping[int, Sequence[Part]]) -> Written:
    """A file with the parts of each rank; CheckpointError where they have holes or overlap."""
    ordered = sorted((part, rank) for rank, each in parts.items() for part in each)
    ends = [len(made.head), *(part.end for part, _ in ordered)]
    if [*(part.start for part, _ in ordered), made.starts[-1]] != ends:
        raise CheckpointError("the rows of the ranks do not make the whole file", where=str(path))
    return Written([(tensor.name, tensor.dtype, tensor.shape) for tensor in made.tensors], ordered)


def read_back(path: Path, made: Layout, parts: Sequence[tuple[Part, int]]) -> Digests:
    """The digests of a complete file, read from the disk. `made` needs no data. UntrustedDiskError where the disk has another header, or
    other bytes than a rank wrote."""
    whole, digests, end = blake3.blake3(), list[str](), 0
    of_part, of_tensor, bounds = xxhash.xxh3_128(), xxhash.xxh3_128(), iter(parts)
    part = next(bounds, None)
    for place, piece in _between(path, sorted({*made.starts, *(each.end for each, _ in parts)})):
        whole.update(piece)
        end = place + len(piece)
        if end <= len(made.head):
            if piece != made.head[place:end]:
                raise untrusted(str(path), "the header does not read back as it was written")
        else:
            of_part.update(piece)
            of_tensor.update(piece)
        if part and end == part[0].end:
            if of_part.hexdigest() != part[0].digest:
                raise untrusted(str(path), f"does not read back as rank {part[1]} wrote it")
            of_part, part = xxhash.xxh3_128(), next(bounds, None)
        while len(digests) < len(made.tensors) and made.starts[len(digests) + 1] == end:
            digests.append(f"xxh3-128:{of_tensor.hexdigest()}")
            of_tensor = xxhash.xxh3_128()
    if end != made.starts[-1]:
        raise untrusted(str(path), f"has {end:,} bytes on the disk, and {made.starts[-1]:,} were written")
    return Digests(f"blake3:{whole.hexdigest()}", digests)


def finished(path: Path, made: Layout, found: Digests) -> FileRecord:
    """The record of a file that was read back; nothing writes it any more."""
    os.chmod(path, DONE)
    pairs = zip(made.tensors, found.tensors, strict=True)
    records = tuple(TensorRecord(tensor.name, tensor.dtype, tensor.shape, digest) for tensor, digest in pairs)
    return FileRecord(made.starts[-1], found.file, records)


def shared_out(sizes: Mapping[str, int], ranks: Sequence[int]) -> dict[int, list[str]]:
    """The files that each rank reads: the largest first, each to the rank that has least, and of equal ones to the first named."""
    loads, found = dict.fromkeys(ranks, 0), dict[int, list[str]]()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(loads, key=loads.__getitem__)
        loads[rank] += sizes[name]
        found.setdefault(rank, []).append(name)
    return found


def readers(ranks: int, beside: int) -> list[int]:
    """All ranks, of which a host has `beside`, in the order in which they get files to read: one of each host before a second, and rank 0
    last, which has more to do. All must be told the same number: hosts may have different ones."""
    ordered = sorted(range(ranks), key=lambda rank: (rank % beside, rank))
    return [*ordered[1:], 0]


def untrusted(where: str, message: str) -> UntrustedDiskError:
    return UntrustedDiskError(message, where=where, hint="this disk cannot be trusted: use another one")


def _between(path: Path, stops: Sequence[int]) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a file from the disk itself, with their places, in pieces that end at each stop."""
    left, place = list(reversed(stops)), 0
    buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    with os.fdopen(open_uncached(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            used = 0
            while used < count:
                size = min(count - used, left[-1] - place) if left else count - used
                if size:
                    yield place, buffer[used : used + size]
                used, place = used + size, place + size
                while left and left[-1] == place:
                    left.pop()


def _write(descriptor: int, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while view:  # a write may take less than it is given
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count
