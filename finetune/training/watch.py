"""Ends a training of several ranks soon after one is lost, and says which: `hosts.presence` finds out, and this acts on it.

A main thread that waits for a lost rank in native code cannot be interrupted. So the process is ended from beside it, once the
running save is over; that is as safe as a kill.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator

from finetune.errors import FinetuneError, LostRankError
from finetune.hosts import told
from finetune.hosts.launch import PASSING
from finetune.hosts.presence import Loss, Presence, UnreachableError
from finetune.recipe.schema import Recipe
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives
from finetune.training.saving.rank_reports import Reports

NAMING_SECONDS = 3.0  # for rank 0 to say which rank a broken connection belonged to
RAISING_SECONDS = 5.0  # for the main thread to see a closed connection itself: NCCL may not
LOOK_SECONDS = 0.2
MOST_CHARACTERS = 300  # of an error, to the other ranks
LOOPBACK = ("127.0.0.1", "localhost")


class Watch:
    """A context; within, the loss of another rank ends this one. Does nothing where there is one rank."""

    def __init__(self, accelerator: Accelerator, run: Path, recipe: Recipe):
        self._accelerator = accelerator
        self._run = RunDirectory(run)
        self._left = set(self._run.saves())  # by a process that was killed
        self._grace_seconds = recipe.checkpoint.grace_seconds
        self._silence_seconds = recipe.train.lost_rank_seconds
        self._presence: Presence | None = None
        self._loss: Loss | None = None
        self._is_known = threading.Event()
        self._reports: Reports | None = None
        self._has_raised = threading.Event()
        """Whether the main thread is on its way out by itself."""

    def __enter__(self) -> "Watch":
        if self._accelerator.num_processes > 1:
            self._presence = self._begin()
        return self

    def _begin(self) -> Presence | None:
        """A collective."""
        rank, address = self._accelerator.process_index, os.environ.get("MASTER_ADDR", "")
        is_local = address in LOOPBACK or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        presence, meeting = Presence(rank, self._silence_seconds, self._lost), ""
        if rank == 0:
            token = secrets.token_hex(16)
            meeting = json.dumps([presence.listen(token, is_local), token, socket.gethostname()])
        port, token, host = json.loads(collectives.text_of_rank_0(self._accelerator, meeting))
        if rank:
            try:
                presence.connect(["127.0.0.1"] if is_local else [address, host], port, token, host)
            except UnreachableError as error:
                late = "a process that hangs is noticed late"
                text = f"warning: rank {rank} cannot show rank 0 that it is alive ({error}): {late}"
                print(text, file=sys.stderr, flush=True)
                return None
        return presence

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_raised.set()
        if self._presence is None:
            return
        lost = collectives.lost_rank(error) if isinstance(error, RuntimeError) else None
        named = lost and self._named()
        if error and lost and not named:  # the others know no more
            self._presence.leave(_first_line(error))
        elif lost or error is None or isinstance(error, LostRankError):
            self._presence.leave()
        elif isinstance(error, FinetuneError):
            self._presence.leave(_first_line(error), "" if error.code in PASSING else error.code)
        elif isinstance(error, Exception):
            self._presence.leave(f"{type(error).__name__}: {_first_line(error)}")
        else:
            self._presence.leave(is_silent=True)
        if named:
            raise named from error

    @contextmanager
    def until_it_raises(self, reports: Reports | None) -> Iterator[None]:
        """Within, the main thread may wait for another rank. What it does after an error, like closing files, is left to it."""
        self._reports = reports
        try:
            yield
        finally:
            self._has_raised.set()

    def _lost(self, loss: Loss) -> None:
        self._loss = loss
        self._is_known.set()
        threading.Thread(target=self._end, args=(loss,), name="ending", daemon=True).start()

    def _named(self) -> LostRankError | None:
        """The error that says which rank was lost; None if that stays unknown."""
        self._is_known.wait(NAMING_SECONDS)
        return self._error_of(self._loss) if self._loss else None

    def _error_of(self, loss: Loss) -> LostRankError:
        own = self._accelerator.process_index
        lost = f"lost another rank: rank {loss.rank} on {loss.host} {loss.why}"
        is_own = loss.rank == own
        error = LostRankError(f"the others ended: this rank {loss.why}" if is_own else lost, where=f"rank {own}")
        # What one rank cannot do, all of them would fail at again: no launcher of another host starts again either.
        error.code = loss.code or error.code
        return error

    def _end(self, loss: Loss) -> None:
        """In a thread: ends the process, unless the main thread does so."""
        if not loss.is_silent and self._has_raised.wait(RAISING_SECONDS):
            return
        deadline = time.monotonic() + self._grace_seconds
        while self._is_save_worth_it(loss) and time.monotonic() < deadline and not self._has_raised.wait(LOOK_SECONDS):
            pass
        if self._has_raised.is_set():
            return
        error = self._error_of(loss)
        print(error, file=sys.stderr, flush=True)
        told.tell(error.code)
        if self._presence:
            self._presence.leave()
        os._exit(error.exit_code)

    def _is_save_worth_it(self, loss: Loss) -> bool:
        """Whether a save is under way that may still be committed: rank 0 commits, and may wait for rows of the lost rank."""
        if not set(self._run.saves()) - self._left:
            return False
        if self._accelerator.process_index == 0:
            return self._reports is None or self._reports.awaited != loss.rank
        return loss.rank != 0 and self._presence is not None and self._presence.is_connected


def _first_line(error: BaseException) -> str:
    """For the other ranks: the one that failed says the rest."""
    return str(error).partition("\n")[0][:MOST_CHARACTERS]
