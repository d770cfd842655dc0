"""Floor 0. One writer a run. `run` holds the lease from before it reads the run directory until it has ended.

The kernel's lock is the truth: it goes with its process, however that dies, while a restarted container has the same pid and boot
id again. `lease.json` only names the holder.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from finetune.checkpoints.durable import failures, make_directory
from finetune.checkpoints.manifest import to_json
from finetune.errors import RunError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Lease:
    """The right to write a run directory, until it is released; made by `acquire`. Forked children share it, and prolong it."""

    def __init__(self, run: Path, attempt: str, descriptor: int):
        self.run = run
        self.attempt = attempt
        self._descriptor = descriptor

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        # Both files stay: who removes a lock file lets the next two processes lock two different ones.
        os.close(self._descriptor)


def acquire(run: Path, attempt: str) -> Lease:
    """Makes the run directory where there is none, and locks it; RunError where another process holds it or it cannot be written."""
    with failures(run, RunError):
        make_directory(run)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (run / "lease.json").write_text(f"{to_json(_holder(attempt))}\n")
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                hint = "wait until it ends, stop it, or use another --run directory"
                raise RunError(f"is in use by {_name_holder(run)}", where=str(run), hint=hint) from None
            if error.errno in _NO_LOCKS:
                raise RunError(
                    "is on a file system without locks", where=str(run), hint="use a directory on another one"
                ) from error
            raise
    return Lease(run, attempt, descriptor)


def _holder(attempt: str) -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "boot_id": _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else None,
        "pid": os.getpid(),
        "attempt": attempt,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _name_holder(run: Path) -> str:
    try:
        holder = json.loads((run / "lease.json").read_bytes())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} (attempt {holder['attempt']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder may be just about to write it
        return "another process"
