"""Turns signals into wishes of a training: to end, or to save."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from finetune.store.rank import is_first

PARENT = "FINETUNE_PARENT"
"""The process that a training ends with."""
SET_PDEATHSIG = 1  # of prctl(2)
SAME_SIGNAL_SECONDS = 2.0
STOPPING = "stopping: what is under way is finished and committed; a second signal ends at once"


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a training. SIGHUP, a closed terminal, is one of them unless `nohup` ignores it."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if is_ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_with(parent: int) -> None:
    """Sends this process SIGTERM once the one that started it is dead, however it died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(parent, 0)
    except ProcessLookupError:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


class Signals:
    """SIGTERM, SIGINT and SIGHUP end the process before training; in training the loop asks for them, and a second one ends it at once. A
    repetition within two seconds counts as one: launcher and scheduler may both send it. SIGUSR1 asks for a save at the next step's edge.

    A thread reads them, because the main one may wait in native code for a lost rank.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0
        self.is_training = False
        self.is_save_wished = False
        self.say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        """Progress replaces it, so that no message sticks to its line."""

    def __enter__(self) -> "Signals":
        self._ending = ending_signals()
        heard, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._thread = threading.Thread(target=self._hear, args=(heard,), name="signals", daemon=True)
        self._thread.start()
        self._previous_written = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        self._previous = {each: signal.signal(each, lambda *_: None) for each in (*self._ending, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_written)
        os.close(self._written)
        self._thread.join()

    def _hear(self, heard: int) -> None:
        """Each signal is a byte in a pipe; closing the pipe ends this thread."""
        while numbers := os.read(heard, 100):
            for number in numbers:
                if number == signal.SIGUSR1:
                    self.is_save_wished = True
                elif number in self._ending:
                    self._receive(number)
        os.close(heard)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self.received is not None and now - self.received_at < SAME_SIGNAL_SECONDS:
            return
        if self.received is not None or not self.is_training:
            os._exit(128 + number)  # not an exception: thrown into a library's import it would become another one
        self.received, self.received_at = number, now
        if is_first(os.environ):
            self.say(STOPPING)
