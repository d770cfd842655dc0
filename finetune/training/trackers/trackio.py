"""trackio on this machine, by its own storage: that of its `log` runs on a thread, and drops figures if the disk refuses them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import cast

from finetune.recipe.schema.trackers import TrackioTracker
from finetune.training.trackers.tracker import Has, Start

_STATES = ("started", "committed")


class Logged:
    def __init__(self, about: Start, project: str):
        from trackio.sqlite_storage import SQLiteStorage

        self._storage = SQLiteStorage
        self._about = {"project": project, "run": f"{about.name}-{about.id[:6]}", "run_id": about.id}
        self._config = about.flat_config | {"_Group": _group(about)}
        self._figures: list[tuple[int, Mapping[str, float], str]] = []
        self.place = f"trackio show --project {project}"
        self.had = _had(self._storage.get_logs(project, run_id=about.id))

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        self._figures.append((step, figures, _text(time)))

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        level = "info" if kind in _STATES else "warn"
        # One with the id of an earlier one is ignored.
        known = f"{self._about['run_id']}-{kind}-{step}"
        self._storage.bulk_alert(
            **self._about,
            titles=[kind],
            texts=[text],
            levels=[level],
            steps=[step],
            timestamps=[_text(time)],
            alert_ids=[known],
        )

    def flush(self) -> None:
        if self._figures:
            steps, figures, times = zip(*self._figures, strict=True)
            more = {"steps": [*steps], "timestamps": [*times], "config": self._config}
            self._storage.bulk_log(**self._about, metrics_list=[*map(dict, figures)], **more)
            self._figures = []

    def finish(self) -> None:
        """Every batch is in its database."""


def start(about: Start) -> Logged:
    return Logged(about, cast(TrackioTracker, about.settings("trackio")).project)


def _group(about: Start) -> str:
    """A branch is shown with its parent."""
    return about.plan.parent.run if about.plan.parent else about.id


def _had(logs: list[dict[str, object]]) -> Has | None:
    steps = [cast(int, line["step"]) for line in logs if "loss" in line]
    evaluated = [cast(int, line["step"]) for line in logs if "held_out_loss" in line]
    return Has(max(steps, default=0), max(evaluated, default=-1)) if logs else None


def _text(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat()
