"""Files in pieces named by their content: read for a mirror, and put together again, verified."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import blake3

from finetune.errors import RunError
from finetune.store.durable import HashedFile, failures
from finetune.store.mirror.bucket import Alive, Bucket
from finetune.store.mirror.records import DamagedError, MirroredFile, piece_name

PIECE_BYTES = 32 << 20
"""A cut costs at most one piece, and every store takes one in a single request."""
LOG_PIECE_BYTES = 1 << 20
"""Of a file that grows at its end: only its last piece is sent again."""


class Sending:
    """Puts the pieces that a bucket lacks, several at once."""

    def __init__(self, bucket: Bucket, known: Mapping[str, int], alive: Alive):
        self._bucket = bucket
        self._known = dict(known)
        """Bytes of the objects in the bucket: one of another size is not what its name says."""
        self.sent_bytes = 0
        self._alive = alive
        self._threads = ThreadPoolExecutor(bucket.parallel, thread_name_prefix="mirror")
        self._running: deque[tuple[int, Future[None]]] = deque()

    def file(self, file: BinaryIO, piece_bytes: int = PIECE_BYTES, limit: int | None = None) -> MirroredFile:
        """Sends a file, or its first `limit` bytes. The last pieces may be under way until `finish`."""
        whole, size, pieces = blake3.blake3(), 0, []
        while content := file.read(piece_bytes if limit is None else min(piece_bytes, limit - size)):
            whole.update(content)
            size += len(content)
            self._alive()
            digest = blake3.blake3(content).hexdigest()
            pieces.append(digest)
            if self._known.get(piece_name(digest)) != len(content):
                self._put(digest, content)
        return MirroredFile(size, f"blake3:{whole.hexdigest()}", tuple(pieces))

    def has(self, file: MirroredFile) -> bool:
        """Whether all pieces of a file are in the bucket."""
        sizes = [self._known.get(piece_name(piece)) for piece in file.pieces]
        return None not in sizes and sum(size or 0 for size in sizes) == file.bytes

    def finish(self) -> None:
        """Returns when all pieces are in the bucket."""
        while self._running:
            self._take()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _put(self, digest: str, content: bytes) -> None:
        while len(self._running) >= self._bucket.parallel:
            self._take()
        name = piece_name(digest)
        # Now, so that equal pieces are sent once. An error ends this object anyway.
        self._known[name] = len(content)
        self._running.append((len(content), self._threads.submit(self._bucket.put, name, content)))

    def _take(self) -> None:
        size, running = self._running.popleft()
        running.result()
        self.sent_bytes += size
        self._alive()


def fetch(bucket: Bucket, file: MirroredFile, path: Path, mode: int = 0o444) -> None:
    """Writes a file from its pieces, durably. DamagedError names the object that is missing or has other bytes; then there is no file."""
    with failures(path, RunError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        written = HashedFile(descriptor)
        for content in contents(bucket, file.pieces):
            with failures(path, RunError):
                written.write(content)
        with failures(path, RunError):
            written.sync()
        if (written.bytes, written.digest()) != (file.bytes, file.digest):
            raise DamagedError(f"the pieces of {path.name} do not make the file", where=bucket.place)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def content_of(bucket: Bucket, file: MirroredFile) -> bytes:
    """A small file."""
    return b"".join(contents(bucket, file.pieces))


def contents(bucket: Bucket, digests: Sequence[str]) -> Iterator[bytes]:
    """The pieces in order, each compared with its digest; a few are read ahead."""
    with ThreadPoolExecutor(bucket.parallel, thread_name_prefix="mirror") as threads:
        ahead: deque[Future[bytes]] = deque()
        try:
            for digest in digests:
                ahead.append(threads.submit(_piece, bucket, digest))
                if len(ahead) > bucket.parallel:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for running in ahead:
                running.cancel()


def _piece(bucket: Bucket, digest: str) -> bytes:
    name = piece_name(digest)
    content = bucket.read(name)
    if content is not None and blake3.blake3(content).hexdigest() != digest:
        content = bucket.read(name)  # again: it may have been damaged on its way
    if content is None:
        raise DamagedError(f"the object {name} is missing", where=bucket.place)
    if blake3.blake3(content).hexdigest() != digest:
        message = f"the object {name} is damaged: it has other bytes than its name says"
        raise DamagedError(message, where=bucket.place, object_name=name)
    return content
