"""The numbers of tensors in safetensors files, whole or some rows of them, read without mapping the file.

A mapped file that gets shorter ends the process, and its pages count as memory of the process; what is read here fails with an error.
"""

import os
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

from finetune.errors import explained
from finetune.model.base import outline
from finetune.model.base.damaged import damaged, name_of
from finetune.store.tensors import ITEM_BYTES, Place

PIECE_BYTES = 4 << 20


class StoredRows:
    """The tensors of a model's files by name. Close it."""

    def __init__(self, path: Path):
        self._path = path
        self.places: dict[str, Place] = {}
        self._files: dict[str, str] = {}
        self._open: dict[str, int] = {}
        self._buffer: torch.Tensor | None = None
        """One for all tensors: with another for each, their memory would lie between holes."""
        for file, places in outline.headers_by_file(path).items():
            self.places |= places
            self._files |= dict.fromkeys(places, file)

    def read(self, name: str, first: int = 0, end: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The rows from `first` up to `end`, on the CPU, in memory of their own; a scalar has no rows. In the type of the file, or in
        another: then only a piece is in memory in both.

        BaseError if the file ends before them or cannot be read.
        """
        place = self.places[name]
        shape = place.shape
        if shape:
            shape = (len(range(first, shape[0] if end is None else end)), *shape[1:])
        size, stored = ITEM_BYTES[place.dtype], outline.TYPES[place.dtype]
        numbers = torch.empty(shape, dtype=dtype or stored)
        flat, start = numbers.reshape(-1), place.start + first * prod(place.shape[1:]) * size
        if numbers.dtype == stored:
            self._fill(flat, name, start)
            return numbers
        if self._buffer is None:
            self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        buffer = self._buffer.view(stored)
        for begin in range(0, len(flat), len(buffer)):
            piece = buffer[: len(flat) - begin]
            self._fill(piece, name, start + begin * size)
            flat[begin : begin + len(piece)].copy_(piece)
        return numbers

    def close(self) -> None:
        for descriptor in self._open.values():
            with suppress(OSError):
                os.close(descriptor)
        self._open, self._buffer = {}, None

    def _fill(self, flat: torch.Tensor, name: str, start: int) -> None:
        view = memoryview(flat.view(torch.uint8).numpy().data) if len(flat) else memoryview(b"")
        path = self._path / self._files[name]
        with explained("cannot be read", name_of(self._path), hint="download or copy it again"):
            if path.name not in self._open:
                self._open[path.name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while view:
                count = os.preadv(self._open[path.name], [view], start)
                if not count:
                    raise damaged(path, "it ends before its last tensor")
                view, start = view[count:], start + count
