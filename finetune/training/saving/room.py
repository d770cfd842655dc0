"""Whether the disk has room for a save, and which failures of a save may pass."""

import errno
from pathlib import Path

from finetune.errors import CheckpointError, FinetuneError
from finetune.plan.disk import free_bytes, readable
from finetune.store.durable import HINTS
from finetune.store.run.journal import FULL_DISK
from finetune.training.saving.rank_reports import MissingReport

SPARE = 1.2  # times the bytes of a save must be free: journal and row losses grow too, and so do other people's files


class NoRoom(CheckpointError):
    """The disk has too little space for a save."""


def refuse_small(run: Path, stored_bytes: int) -> None:
    """NoRoom, before anything is written: a save that fills the disk also stops the journal."""
    needed, free = round(SPARE * stored_bytes), free_bytes(run)
    if needed > free:
        message = f"it needs {readable(needed)}, and the disk has {readable(free)} left"
        raise NoRoom(message, hint=HINTS[errno.ENOSPC])


def is_passing(error: FinetuneError) -> bool:
    """Whether a later save may go better."""
    cause = error.__cause__
    return isinstance(error, NoRoom | MissingReport) or (isinstance(cause, OSError) and cause.errno in FULL_DISK)
