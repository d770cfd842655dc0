"""Weights & Biases.

Its own steps only grow, and a step that was logged stays as it is. So the run's steps are a figure, and those of the client say what
the server has: 2 s for the update of step s, and one more for its evaluation.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from finetune.recipe.schema.trackers import WandbTracker
from finetune.training.trackers.tracker import Has, Start

if TYPE_CHECKING:
    from wandb import Run

_STATES = ("started", "committed")


class Logged:
    def __init__(self, run: "Run", had: Has | None):
        self.place = run.url or str(Path(run.dir).parent)
        self.had = had
        self._run = run
        self._last = run.step - 1

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        is_evaluation = "held_out_loss" in figures
        self._last = max(2 * step + is_evaluation, self._last + 1)
        self._run.log({"step": step, "_timestamp": time, **figures}, step=self._last)

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        if kind in _STATES:
            self._run.summary[kind] = step
        else:
            self._run.alert(title=f"step {step}: {kind}", text=text)

    def flush(self) -> None:
        """Its own process has what was logged, and the next one asks the server what arrived."""

    def finish(self) -> None:
        self._run.finish()


def start(about: Start) -> Logged:
    import wandb

    settings, parent = cast(WandbTracker, about.settings("wandb")), about.plan.parent
    run = wandb.init(
        id=about.id,
        resume="allow",
        name=about.name,
        project=settings.project,
        entity=settings.entity,
        group=parent.run if parent else about.id,
        tags=["branch"] if parent else None,
        config=about.config,
        dir=str(about.run.trackers),
        # What the process prints, and the code around it, are no figures of a run.
        settings=wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    if run.offline:
        _remove_others(Path(run.dir).parent, about.id)
        return Logged(run, None)
    step, rest = divmod(run.step - 1, 2)
    return Logged(run, Has(step, step if rest else step - 1) if run.resumed else None)


def _remove_others(folder: Path, run: str) -> None:
    """Files of earlier attempts: offline, an attempt cannot go on with them, and writes all figures again."""
    for other in folder.parent.glob(f"offline-run-*-{run}"):
        if other != folder:
            shutil.rmtree(other)
