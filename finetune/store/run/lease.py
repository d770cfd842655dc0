"""One writer a run: it takes the lease before it reads the run directory, and holds it until it ends.

The kernel's lock decides: it ends with its process, however that dies. A pid does not: a restarted container has the same pid and boot
id again. Without locks in the file system, the holder's heartbeat in `lease.json` decides, and you take over with an option.
"""

import os
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from finetune.errors import RunError, RunInUseError
from finetune.store import lock
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.durable import failures, make_directory, sync_directory
from finetune.store.run import holder as holders
from finetune.store.run.directory import JOURNAL, LEASE, PLAN, RunDirectory
from finetune.store.run.holder import NOBODY, UNKNOWN, Holder

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 3 * HEARTBEAT_SECONDS
_SIGNS = {PLAN, JOURNAL, LEASE}  # any of them is in every run
_BESIDE = (".", "lock", "lost+found", f"{LEASE}.")  # names that begin so say nothing
_LOGS = (".log", ".out", ".err")
_LOOKS = 30  # while a heartbeat is watched
_STOP_IT = "wait until it ends, stop it, or use another --run directory"


class Lease:
    """The right to write a run directory, until its release. Get it from `acquire`. Forked children share a lock, and prolong it."""

    def __init__(self, run: Path, holder: Holder, previous: Holder | None, releasing: ExitStack):
        self.run = run
        self.attempt = holder.attempt
        self.previous = previous
        """The last holder, if it died without releasing the lease."""
        self._holder = holder
        self._releasing = releasing

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """RunError if another process took the run over while this one was stopped; call it right before a commit.

        A failed heartbeat (a full disk) does not end the lease: it lasts while the file names us.
        """
        with failures(self.run, RunError, what="cannot read the lease"):
            now = holders.read(RunDirectory(self.run).lease)
        if now is not None and now.token == self._holder.token:
            return
        if now in (None, UNKNOWN) and self._holder.beat is None:
            return  # the file is gone or damaged: it names no other process, and the lock is ours
        taker = now or f"nobody: somebody removed {LEASE}"
        hint = "what this process had not committed is lost; wait for the other one, or use another --run directory"
        raise RunError(f"was taken over by {taker}", where=str(self.run), hint=hint)

    def release(self) -> None:
        # Both files stay: who removes a lock file lets the next two processes lock two different ones.
        self._releasing.close()


def acquire(run: Path, attempt: str, take_over: bool = False) -> Lease:
    """Makes the run directory if needed, and takes its lease.

    RunError if another process holds it or it cannot be written. `take_over` is for file systems without locks: a holder
    without a heartbeat for STALE_SECONDS loses the run. It never breaks a held lock.
    """
    refuse_other_directory(run)
    with failures(run, RunError), ExitStack() as undo:
        make_directory(run)
        is_locked = _lock(run, take_over, undo)
        holder = holders.this_process(attempt, beat=None if is_locked else _beat(0))
        descriptor = os.open(_new(run, holder), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        undo.callback(os.close, descriptor)
        undo.callback(_write_released, descriptor, holder)
        try:
            holders.write(descriptor, holder)
            os.fsync(descriptor)
            chain = _free_chain(run, descriptor, is_locked, take_over)
            _install(run, holder, chain)
        finally:
            _new(run, holder).unlink(missing_ok=True)
        if not is_locked:
            _start_heart(descriptor, holder, undo)
        return Lease(run, holder, chain[0] if chain[0].released is None else None, undo.pop_all())


def refuse_other_directory(run: Path) -> None:
    """RunError if a directory with files is not a run, like one with data: a run must not write among them. Hidden files and logs are
    allowed."""
    with failures(run, RunError):
        names = sorted(os.listdir(run)) if run.is_dir() else []
    foreign = [name for name in names if not name.startswith(_BESIDE) and not name.endswith(_LOGS)]
    if foreign and not _SIGNS & set(names) and not _has_checkpoint(RunDirectory(run)):
        shown = ", ".join(foreign[:3]) + (" …" if len(foreign) > 3 else "")
        hint = "name a directory that is new or empty with --run"
        raise RunError(f"is not empty, and is not a run: it has {shown}", where=str(run), hint=hint)


def _has_checkpoint(run: RunDirectory) -> bool:
    return any((run.checkpoint(step) / MANIFEST).exists() for step in run.stored_steps())


def _lock(run: Path, take_over: bool, undo: ExitStack) -> bool:
    """Whether this process has the kernel's lock now; False if there are no locks."""
    descriptor = os.open(RunDirectory(run).lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    undo.callback(os.close, descriptor)
    try:
        return lock.take(descriptor)
    except BlockingIOError:
        named = holders.read(RunDirectory(run).lease) or UNKNOWN
        if named.released is not None:
            named = UNKNOWN  # it is of the one before: the holder is just about to write its own
        hint = f"its lock is held, so it lives, and --take-over does not help: {_STOP_IT}" if take_over else _STOP_IT
        raise _in_use(run, named, hint) from None


def _free_chain(run: Path, descriptor: int, is_locked: bool, take_over: bool) -> list[Holder]:
    """The lease and the claims on it, if all their processes are dead; RunError if one lives, or may."""
    chain = _chain(run)
    living = [member for member in chain if not _is_gone(member, is_locked)]
    if not living:
        return chain
    if living[0].beat is None:
        hint = f"its lock cannot be seen from here; if you are sure that it is dead, remove {RunDirectory(run).lease}"
        raise _in_use(run, living[0], hint)
    if not take_over:
        hint = f"if it is dead: `finetune train --take-over` waits {STALE_SECONDS:.0f} seconds for a heartbeat, and goes on if there is none"
        raise _in_use(run, f"{living[0]}{_last_heartbeat(run, descriptor) if living[0] is chain[0] else ''}", hint)
    # Looks are counted instead of a clock being read: where both machines were paused, no time has passed for the holder.
    for _ in range(_LOOKS):
        time.sleep(STALE_SECONDS / _LOOKS)
        now = _chain(run)
        if now != chain:
            if all(_is_gone(member, is_locked) for member in now):
                return now
            raise _in_use(run, f"{living[0]}, which is alive", _STOP_IT)
    return chain


def _install(run: Path, holder: Holder, chain: list[Holder]) -> None:
    """Makes the new file of `holder` the lease; RunError if another process was first.

    Without a lock, several processes may get here at once. A lease X has one successor: only one file can be linked as `X.next`, and
    it counts only if `lease.json` is still X afterwards. While it is, nothing removes X.next. A successor that dies or sleeps before its rename
    gets its own successor, and that first removes its new file: if it wakes up, it has nothing to rename. So exactly one file
    replaces X, and later removals affect only names that no longer count.
    """
    new, is_first = _new(run, holder), True
    for claimant in chain[1:]:
        _new(run, claimant).unlink(missing_ok=True)
    if holder.beat is not None:
        # What became of it is read: NFS may repeat a request that had succeeded, and report that it failed.
        with suppress(FileExistsError, FileNotFoundError):
            os.link(new, _path(run, chain))
        is_first = [one.token for one in _chain(run)] == [*(one.token for one in chain), holder.token]
    if is_first:
        with suppress(FileNotFoundError):
            os.rename(new, RunDirectory(run).lease)
    if holders.read(RunDirectory(run).lease) != holder:
        raise _in_use(run, "another process, which came first at this very moment", _STOP_IT)
    sync_directory(run)
    for length in range(1, len(chain) + 1):
        _path(run, chain[:length]).unlink(missing_ok=True)
    for left in run.glob(f"{LEASE}.*.new"):  # of those that were killed; who is still waiting has lost
        left.unlink(missing_ok=True)


def _start_heart(descriptor: int, holder: Holder, undo: ExitStack) -> None:
    """Beats from a daemon thread until the lease is released."""
    is_released = threading.Event()

    def beat() -> None:
        count = 0
        while not is_released.wait(HEARTBEAT_SECONDS):
            count += 1
            with suppress(OSError):  # a full disk, or a lease that was taken over: `Lease.check` tells
                # Into our own file, wherever `lease.json` leads by now: a replacement could fall on the lease of another process.
                holders.write(descriptor, replace(holder, beat=_beat(count)))
                os.fsync(descriptor)  # not for power cuts: other hosts see only what has left this one's page cache

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    undo.callback(thread.join, HEARTBEAT_SECONDS)
    undo.callback(is_released.set)


def _beat(count: int) -> str:
    return f"{count:012}"


def _last_heartbeat(run: Path, descriptor: int) -> str:
    """Compares times of the file system, of files the two processes wrote: clocks of two hosts may differ."""
    seconds = os.stat(descriptor).st_mtime - (RunDirectory(run).lease).stat().st_mtime
    return f", whose last heartbeat was {max(0, round(seconds))} seconds ago"


def _write_released(descriptor: int, holder: Holder) -> None:
    with suppress(OSError):  # the next process finds a dead holder instead, and may ask for --take-over
        holders.write(descriptor, replace(holder, released=holders.now()))
        # Only for other hosts. Under a lock none looks, and a hung disk must not block the process.
        if holder.beat is not None:
            os.fsync(descriptor)


def _chain(run: Path) -> list[Holder]:
    """The holder in `lease.json`, its claimed successor, the successor of that one, and so on."""
    chain = [holders.read(RunDirectory(run).lease) or NOBODY]
    while (member := holders.read(_path(run, chain))) and member not in chain:
        chain.append(member)
    return chain


def _path(run: Path, chain: list[Holder]) -> Path:
    return run / f"{LEASE}.{chain[-1].token}.next"


def _new(run: Path, holder: Holder) -> Path:
    return run / f"{LEASE}.{holder.token}.new"


def _is_gone(holder: Holder, is_locked: bool) -> bool:
    """Whether a holder has released its lease or is certainly dead. If we have the lock, no other process has it."""
    return holder.released is not None or (is_locked and holder.beat is None) or holders.is_dead_here(holder)


def _in_use(run: Path, holder: Holder | str, hint: str) -> RunInUseError:
    return RunInUseError(f"is in use by {holder}", where=str(run), hint=hint)
