"""The holder of a run: the record in `lease.json`, and whether its process is certainly dead."""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune.store.boot import boot_id
from finetune.store.strict_json import to_json

_BYTES = 1024
_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Holder:
    """A process with the lease of a run, or with a claim on it."""

    host: str
    pid: int
    attempt: str
    since: str
    token: str = "unknown"
    """Random, unique to this lease."""
    boot_id: str | None = None
    pid_namespace: str | None = None
    start_ticks: int | None = None
    """Start of the process, in clock ticks after boot: the system reuses pids."""
    beat: str | None = None
    """A counter of fixed width; None if the kernel's lock is held instead."""
    released: str | None = None

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        return f"process {self.pid} on {self.host} since {self.since} (attempt {self.attempt})"


UNKNOWN = Holder(host="", pid=0, attempt="", since="")
NOBODY = Holder(host="", pid=0, attempt="", since="", token="nobody", released="never held")


def read(path: Path) -> Holder | None:
    """The holder in a file; None without a file; UNKNOWN if the file is unreadable."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (PermissionError, ValueError, TypeError):
        return UNKNOWN


def write(descriptor: int, holder: Holder) -> None:
    """Writes in place, always the same number of bytes: a reader in the middle sees old and new digits, but no torn JSON."""
    os.pwrite(descriptor, f"{to_json(asdict(holder)):<{_BYTES - 1}}\n".encode(), 0)


def this_process(attempt: str, beat: str | None) -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        attempt=attempt,
        since=now(),
        token=secrets.token_hex(8),
        **_place(),
        start_ticks=_start_ticks(os.getpid()),
        beat=beat,
    )


def is_here(holder: Holder) -> bool:
    """Whether it belongs to this boot and pid namespace: only there its pid means something."""
    place = _place()
    there = {"boot_id": holder.boot_id, "pid_namespace": holder.pid_namespace}
    return holder.host == socket.gethostname() and place == there and None not in place.values()


def is_dead_here(holder: Holder) -> bool:
    """Whether a process of this boot and pid namespace has ended."""
    if not is_here(holder):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _start_ticks(holder.pid) not in (None, holder.start_ticks)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _place() -> dict[str, str | None]:
    """None if the system does not provide it."""
    return {
        "boot_id": boot_id(),
        "pid_namespace": os.readlink(_PID_NAMESPACE) if _PID_NAMESPACE.is_symlink() else None,
    }


def _start_ticks(pid: int) -> int | None:
    """Field 22 of proc(5)'s `stat`, counted after the name, because that may have spaces and parentheses."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:  # no /proc, or another user's process in a hidden one
        return None
