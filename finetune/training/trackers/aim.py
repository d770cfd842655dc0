"""Aim. It has one value for each step: a figure that comes again replaces the earlier one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from finetune.recipe.schema.trackers import AimTracker
from finetune.training.trackers.tracker import Start

if TYPE_CHECKING:
    from aim import Repo, Run

_STATES = ("started", "committed")


class Logged:
    had = None

    def __init__(self, repository: "Repo", run: "Run"):
        self.place = f"{repository.path}, run {run.hash}"
        self._run = run

    def back_to(self, step: int) -> None:
        """The figures of later steps come again."""

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        for name, value in figures.items():
            self._run.track(float(value), name=name, step=step)

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        say = self._run.log_info if kind in _STATES else self._run.log_warning
        say(text, step=step)

    def flush(self) -> None:
        """What is tracked is in its database."""

    def finish(self) -> None:
        self._run.close()


def start(about: Start) -> Logged:
    from aim import Repo, Run

    settings = cast(AimTracker, about.settings("aim"))
    repository = Repo.from_path(settings.repository, init=True)
    # Its runs have names of its own, which it finds slowly by anything else.
    known = about.run.trackers / "aim.run"
    name = known.read_text() if known.exists() else None
    # One process feeds it at a time: a lock is that of a killed one. What the process prints and uses is no figure of the run.
    run = Run(
        name if name and repository.run_exists(name) else None,
        repo=repository,
        experiment=settings.experiment,
        force_resume=True,
        system_tracking_interval=None,
        capture_terminal_logs=False,
    )
    known.write_text(run.hash)
    run.name = about.name
    run["finetune"] = about.config
    return Logged(repository, run)
