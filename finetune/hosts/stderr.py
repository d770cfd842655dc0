"""Stdin, stdout and stderr of a process that runs for weeks: closed, on a full disk, or with a reader that is gone or stalls."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

AT_ONCE_BYTES = 512  # what POSIX has every pipe take as a whole once it is ready
PATIENCE_MS = 1_000


class _Lasting(io.FileIO):
    """Drops unread output, so that the writer goes on. Suppresses errors; polls, because a stalled reader raises none."""

    def __init__(self, descriptor: int):
        super().__init__(_own(descriptor), "w", closefd=False)
        self._ready = select.poll()
        self._ready.register(self, select.POLLOUT)
        self._patience_ms = PATIENCE_MS

    def write(self, data: "Buffer", /) -> int:
        left = memoryview(data).cast("B")
        count = len(left)
        with suppress(OSError):
            while left and self._ready.poll(self._patience_ms):
                left = left[super().write(left[:AT_ONCE_BYTES]) or len(left) :]
        self._patience_ms = 0 if left else PATIENCE_MS  # we wait once, until somebody reads again
        return count


def _own(descriptor: int) -> int:
    """Opens a terminal again: it may have room for less than a line, so writes must not block, and the shell's own descriptor must stay as it is."""
    try:
        return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # it is none, or has no name in this container
        return descriptor


def secure() -> None:
    """A failing stderr ends no process. No file of a run gets one of the three descriptors, because native code may write to them.

    stdout stays as it is: it carries data, and a command fails if its data cannot be written.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 as long as the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is not sys.__stderr__:  # who replaced it looks after it
        return
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    lasting = io.BufferedWriter(_Lasting(2))
    sys.stderr = io.TextIOWrapper(lasting, encoding, errors="backslashreplace", line_buffering=True)
