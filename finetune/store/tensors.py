"""Safetensors files: a writer that streams and hashes, and a reader of headers that checks everything.

The safetensors library writes without syncing and leaves mode 0600; here `store` owns the file and this module only its bytes.
The format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from finetune.errors import CheckpointError
from finetune.store.strict_json import from_json

PIECE_BYTES = 1 << 20
HEADER_MAX_BYTES = 100_000_000  # the limit of the reference implementation
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}


class Writable(Protocol):
    def write(self, data: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `data` are its contiguous, little-endian bytes, `dtype` is spelled as safetensors does (`BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview
    first: int = 0
    """The place of `data` in the bytes of the whole tensor, of which other processes may have the rest."""
    make: Callable[[], memoryview] | None = None
    """Makes the data when it is written, in place of `data`: then one tensor at a time is in memory."""

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return memoryview(self.data).nbytes == self.bytes


@dataclass(frozen=True)
class TensorRecord:
    """The manifest's record of a tensor. The records of a file are in the order of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


class Place(NamedTuple):
    """The place of a tensor by a header; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write(file: Writable, tensors: Sequence[Tensor], metadata: dict[str, str]) -> list[TensorRecord]:
    """Streams a whole safetensors file in pieces of at most 1 MiB; each tensor is hashed on the way.

    Wide items come first and the header is padded to 8 bytes, so every tensor is aligned and there are no holes.
    """
    for tensor in tensors:
        if not tensor.make:  # before a byte is written
            _refuse_part(tensor)
    ordered = in_order(tensors)
    for piece in pieces(beginning(ordered, metadata)):
        file.write(piece)
    records = []
    for tensor in ordered:
        if tensor.make:
            tensor = replace(tensor, data=tensor.make())
            _refuse_part(tensor)
        digest = xxhash.xxh3_128()
        for piece in pieces(tensor.data):
            file.write(piece)
            digest.update(piece)
        records.append(TensorRecord(tensor.name, tensor.dtype, tensor.shape, f"xxh3-128:{digest.hexdigest()}"))
    return records


def _refuse_part(tensor: Tensor) -> None:
    if not tensor.is_whole:
        size = memoryview(tensor.data).nbytes
        raise ValueError(f"{tensor.name}: {size} bytes are not {tensor.dtype} of shape {tensor.shape}")


def in_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In the order of a file's bytes."""
    return sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))


def pieces(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """The bytes of a buffer in views of at most 1 MiB."""
    view = memoryview(data)
    if view.nbytes:  # an empty view cannot be cast
        view = view.cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def beginning(tensors: Sequence[Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a file before those of its tensors, which come in this order."""
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        if tensor.name in entries:
            raise ValueError(f"{tensor.name}: two tensors have this name")
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def read_header(path: Path) -> dict[str, Place]:
    """The place of each tensor of a file. Checks every rule of the format; a CheckpointError names a broken one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > HEADER_MAX_BYTES or 8 + length > size:
            raise _broken(path, f"a header of {length:,} bytes does not fit a file of {size:,}")
        header = file.read(length)
    try:
        entries = from_json(header.decode())
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is not valid JSON: {error}") from error
    if not header.startswith(b"{") or not isinstance(entries, dict):
        raise _broken(path, "the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "`__metadata__` is not a map of strings")
    places = {name: _place(path, name, entry, base=8 + length) for name, entry in entries.items()}
    position = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != position:
            raise _broken(path, f"`{name}` begins at byte {place.start:,}, and the bytes before it end at {position:,}")
        position = place.end
    if position != size:
        raise _broken(path, f"the tensors end at byte {position:,}, the file at {size:,}")
    return places


def damaged(path: Path, size: int, records: Sequence[TensorRecord]) -> list[str]:
    """The names of tensors with other bytes than their records; the file has `size` bytes.

    Their places follow from the records, because the file's own header may be damaged.
    """
    names = []
    with path.open("rb", buffering=0) as file:
        file.seek(size - sum(record.bytes for record in records))
        for record in records:
            digest, left = xxhash.xxh3_128(), record.bytes
            while left and (piece := file.read(min(left, PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
            if f"xxh3-128:{digest.hexdigest()}" != record.digest:
                names.append(record.name)
    return names


def _place(path: Path, name: str, entry: object, *, base: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"`{name}` does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"`{name}` has the unknown dtype {dtype}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"`{name}` has the shape {shape} and the offsets {offsets}")
    if offsets[1] - offsets[0] != ITEM_BYTES[dtype] * prod(shape):
        raise _broken(path, f"`{name}` takes {offsets[1] - offsets[0]:,} bytes, which is not {dtype} of shape {shape}")
    return Place(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # a bool is no count


def _broken(path: Path, message: str) -> CheckpointError:
    return CheckpointError(message, where=os.fspath(path), hint="the file is damaged or is not safetensors")
