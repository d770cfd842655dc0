"""One safetensors file that several processes write, each its rows of every tensor.

The bytes are those that one process would write. The first process lays the file out and reads it back at the end, because no other way
gives the digest of a whole file; a process's rows are compared with what it says it wrote.
"""

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import blake3
import xxhash

from finetune.errors import CheckpointError
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.durable import BUFFER_BYTES, open_uncached
from finetune.store.tensors import Tensor, TensorRecord, beginning, in_order, pieces

MADE, DONE = 0o644, 0o444


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


def layout(tensors: Sequence[Tensor], metadata: dict[str, str]) -> Layout:
    ordered = in_order(tensors)
    head = beginning(ordered, metadata)
    return Layout(head, ordered, list(accumulate((tensor.bytes for tensor in ordered), initial=len(head))))


def create(path: Path, made: Layout) -> None:
    """The file with its header, at its full size."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MADE)
    try:
        _write(descriptor, made.head, 0)
        os.posix_fallocate(descriptor, 0, made.starts[-1])  # a full disk is noticed now
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_rows(path: Path, made: Layout) -> list[Part]:
    """Writes what this process has of each tensor, durably."""
    parts = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
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


def finished(path: Path, made: Layout, parts: Mapping[int, Sequence[Part]]) -> FileRecord:
    """The record of a file that is complete, read from the disk. `parts` are those of each rank; CheckpointError where they have holes
    or overlap, or the disk has other bytes than a rank wrote."""
    ordered = sorted((part, rank) for rank, each in parts.items() for part in each)
    ends = [len(made.head), *(part.end for part, _ in ordered)]
    if [*(part.start for part, _ in ordered), made.starts[-1]] != ends:
        raise CheckpointError("the rows of the ranks do not make the whole file", where=str(path))
    whole, records, bounds = blake3.blake3(), [], iter(ordered)
    of_part, of_tensor, part = xxhash.xxh3_128(), xxhash.xxh3_128(), next(bounds, None)
    edges = iter([(made.starts[0], None), *zip(made.starts[1:], made.tensors, strict=True)])
    edge, tensor = next(edges)
    stops = sorted({*made.starts, *(each.end for each, _ in ordered)})
    for place, piece in _between(path, stops):
        whole.update(piece)
        end = place + len(piece)
        if place >= len(made.head):
            of_part.update(piece)
            of_tensor.update(piece)
        if part and end == part[0].end:
            if of_part.hexdigest() != part[0].digest:
                message = f"does not read back as rank {part[1]} wrote it"
                raise CheckpointError(message, where=str(path), hint="this disk cannot be trusted: use another one")
            of_part, part = xxhash.xxh3_128(), next(bounds, None)
        while edge == end:
            if tensor:
                digest = of_tensor.hexdigest()
                records.append(TensorRecord(tensor.name, tensor.dtype, tensor.shape, f"xxh3-128:{digest}"))
                of_tensor = xxhash.xxh3_128()
            edge, tensor = next(edges, (-1, None))
    os.chmod(path, DONE)
    return FileRecord(made.starts[-1], f"blake3:{whole.hexdigest()}", tuple(records))


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
