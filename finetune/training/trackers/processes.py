"""The processes that feed the trackers of a run, one for each. The training waits for them only at its end."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.errors import counted
from finetune.store.run import scan
from finetune.training.companions import SILENT_SECONDS, Process, Work
from finetune.training.trackers import sent
from finetune.training.trackers.follow import CALL_SECONDS

FINISH_SECONDS = 30.0
"""How long the end of a training waits for all trackers together."""


class Tracked:
    """The trackers of a run."""

    def __init__(self, run: Path, names: Sequence[str], say: Callable[[str], None]):
        self._run = run
        self._say = say
        self._names = names
        self._processes = [Process(_work(run, name), say) for name in names]

    def look(self) -> None:
        for process in self._processes:
            process.look()

    def finish(self, seconds: float | None = FINISH_SECONDS) -> dict[str, str]:
        """Waits so long at most for what is not sent yet. Returns and says why not all has arrived, by tracker."""
        for process in self._processes:
            process.end()
        until = None if seconds is None else time.monotonic() + seconds
        both = list(zip(self._names, self._processes, strict=True))
        late = [name for name, process in both if not process.has_ended_within(SILENT_SECONDS)]
        if late and seconds:
            self._say(f"waiting up to {counted(round(seconds), 'second')} for the last figures: {', '.join(late)}")
        left: dict[str, str] = {}
        for name, process in both:
            if reason := process.close(max(0.0, until - time.monotonic()) if until else None, seconds):
                hint = f"they are in the journal, and `finetune track {self._run}` sends them"
                self._say(f"tracker {name}: {_missing(self._run, name)} did not arrive ({reason}); {hint}")
                left[name] = reason
        return left


def _work(run: Path, name: str) -> Work:
    arguments = ("-m", "finetune.training.trackers", str(run), name)
    return Work(f"tracker {name}", arguments, "the journal has its figures", CALL_SECONDS)


def _missing(run: Path, name: str) -> str:
    """The steps that the tracker does not have."""
    known = sent.read(run, name)
    newest, last = max(scan.read(run).steps, default=0), known.step if known else 0
    return f"steps {last + 1} to {newest}" if last < newest else "the last figures"
