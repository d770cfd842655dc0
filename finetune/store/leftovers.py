"""What killed downloads leave in the Hub's cache: files under construction, which no later download continues or removes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.store import lock

QUIET_SECONDS = 300.0  # a download that lives writes more often, also on another host


def remove(repository: Path) -> None:
    """Removes those of a repository's folder in the cache; the client holds a lock on each file that it downloads."""
    locks = repository.parent / ".locks" / repository.name
    for unfinished in (repository / "blobs").glob("*.incomplete"):
        with suppress(OSError), _unlocked(locks / f"{unfinished.name.partition('.')[0]}.lock"):
            if time.time() - unfinished.stat().st_mtime > QUIET_SECONDS:
                unfinished.unlink()


@contextmanager
def _unlocked(file: Path) -> Iterator[None]:
    """Within it nothing else holds the lock; BlockingIOError, an OSError, if another process does."""
    if not file.exists():
        yield
        return
    descriptor = os.open(file, os.O_RDWR)
    try:
        lock.take(descriptor)  # where there are no locks its age decides
        yield
    finally:
        os.close(descriptor)
