"""A run and its mirror: restored from there before a training, and copied there beside it."""

import time
from collections.abc import Callable
from pathlib import Path

from finetune.errors import MirrorError, Problem, RecipeError, counted
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Mirror
from finetune.store.checkpoints.store import Store
from finetune.store.mirror import owner, pulled
from finetune.store.mirror.bucket import CLIENTS, Bucket, is_installed
from finetune.store.mirror.following import CALL_SECONDS, writer_of
from finetune.store.mirror.opening import opened
from finetune.store.run import scan
from finetune.store.run.directory import RunDirectory
from finetune.training.companions import SILENT_SECONDS, Process, Work

FINISH_SECONDS = 600.0
"""How long the end of a training waits for its last commits to be mirrored."""
Say = Callable[[str], None]


def refuse_absent(mirror: Mirror | None, problem: Callable[[str, str, str], Problem]) -> None:
    """RecipeError if the client for the mirror's address is not installed. `problem` takes key, message and hint."""
    if mirror and not is_installed(mirror.to):
        client = CLIENTS[mirror.to.partition("://")[0]]
        message = f"`{mirror.to}` needs the package `{client.package}`, which is not installed"
        raise RecipeError([problem("mirror.to", message, f"pip install 'finetune[{client.extra}]'")])


def restore(loaded: LoadedRecipe, path: Path, say: Say) -> None:
    """Makes a run directory that is not there from the mirror that the recipe names, if that has a commit. MirrorError if it does not
    answer: whether there is a run to resume is then not known.

    With a run on this disk, MirrorError if the mirror is of another run, or has later steps: they would be trained twice.
    """
    mirror = loaded.recipe.mirror
    if mirror is None:
        return
    place = mirror.place_of(path.absolute().name)
    if RunDirectory(path).is_run:
        try:
            _refuse_later(opened(place), path, say)
        except owner.UnusableError:
            raise
        except MirrorError as error:  # of an outage: the run is here
            say(f"warning: {error.message}; whether the mirror is ahead of this disk is not known")
        return
    bucket = opened(place)
    # A rollback goes back to a checkpoint before the newest one.
    count = 2 if loaded.recipe.guard.spike == "rollback" else 1
    step = pulled.restore(bucket, path, say, count)
    if step is not None:
        say(f"restored step {step} from {place}")


def _refuse_later(bucket: Bucket, path: Path, say: Say) -> None:
    run = RunDirectory(path).plan()[1]["run"]
    if owner.refuse_other(bucket, run, path.absolute().name) is None:
        return
    newest = next(pulled.records(bucket, run, say), None)
    here = max(scan.read(path).steps, default=0)
    if newest and newest.step > here:
        message = (
            f"has step {newest.step} of this run, and {path} ends at step {here}: another host has trained it further"
        )
        hint = f"move {path} away, and the same command goes on from the mirror; or train without it: --set mirror=null"
        raise owner.UnusableError(message, where=bucket.place, hint=hint)


def claim(path: Path) -> None:
    """Before the first step of a run: MirrorError if its mirror cannot be written, or is that of another run."""
    mirror = RunDirectory(path).plan()[0].recipe.mirror
    if mirror and not Store(path).checkpoints():
        writer = writer_of(path, mirror)
        # One that is of this run already was written before: its process takes it over in order.
        if owner.refuse_other(writer.bucket, writer.owner.run, writer.owner.name) is None:
            writer.claim()


class Mirroring:
    """The process that mirrors a run beside its training."""

    def __init__(self, run: Path, say: Say):
        self._run = run
        self._say = say
        work = Work("mirror", ("-m", "finetune.store.mirror", str(run)), "nothing is lost here", CALL_SECONDS, True)
        self._process = Process(work, say)

    def look(self) -> None:
        self._process.look()

    def finish(self, seconds: float = FINISH_SECONDS) -> str | None:
        """Waits so long at most for the last commits. Returns and says why not all are mirrored."""
        self._process.end()
        if not self._process.has_ended_within(SILENT_SECONDS):
            self._say(f"waiting up to {counted(round(seconds), 'second')} for the mirror")
        until = time.monotonic() + seconds
        while not self._process.has_ended_within(min(1.0, max(0.0, until - time.monotonic()))):
            self._process.hear()
            if time.monotonic() >= until:
                break
        reason = self._process.close(0.0, seconds)
        if reason:
            self._say(f"not all is mirrored ({reason}); `finetune mirror {self._run}` sends the rest")
        return reason
