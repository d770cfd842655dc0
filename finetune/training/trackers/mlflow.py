"""MLflow, by its client. A figure that it has stays."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from finetune.recipe.schema.trackers import MlflowTracker
from finetune.training.trackers.tracker import Has, Start

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_BATCH, _PARAMS = 1000, 100  # the most that a server takes at once
_PARAM_CHARACTERS = 6000
_ID = "finetune.run"


class Logged:
    def __init__(self, client: "MlflowClient", run: "Run", steps: int):
        self._client = client
        self._id = run.info.run_id
        self._steps = steps
        self._figures: list[Metric] = []
        self.place = f"{client.tracking_uri}, run {self._id}"
        has = Has(self._newest("loss", 0), self._newest("held_out_loss", -1))
        self.had = has if max(has) > 0 else None
        self._last = has.step

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        from mlflow.entities import Metric

        # The figures of a step go together: a kill leaves all of them or none.
        if len(self._figures) + len(figures) > _BATCH:
            self.flush()
        self._figures += [Metric(name, value, round(1000 * time), step) for name, value in figures.items()]
        self._last = step

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        self._client.set_tag(self._id, f"finetune.{kind}", f"step {step}: {text}")

    def flush(self) -> None:
        if self._figures:
            self._client.log_batch(self._id, metrics=self._figures)
            self._figures = []

    def finish(self) -> None:
        self._client.set_terminated(self._id, "FINISHED" if self._last >= self._steps else "KILLED")

    def _newest(self, name: str, otherwise: int) -> int:
        return max((each.step for each in self._client.get_metric_history(self._id, name)), default=otherwise)


def start(about: Start) -> Logged:
    from mlflow import MlflowClient

    client = MlflowClient()
    name = cast(MlflowTracker, about.settings("mlflow")).experiment
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    run = _run_of(client, experiment, about.id)
    if run is None:
        tags = {_ID: about.id, "finetune.plan_id": about.plan.plan_id}
        if parent := about.plan.parent:
            tags["finetune.parent"] = parent.ref
            # Its pages show a branch below the parent, if that is here as well.
            if above := _run_of(client, experiment, parent.run):
                tags["mlflow.parentRunId"] = above.info.run_id
        run = client.create_run(experiment, run_name=about.name, tags=tags)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    _log_config(client, run, about)
    return Logged(client, run, about.plan.steps)


def _run_of(client: "MlflowClient", experiment: str, run: str) -> "Run | None":
    return next(iter(client.search_runs([experiment], f"tags.`{_ID}` = '{run}'", max_results=1)), None)


def _log_config(client: "MlflowClient", run: "Run", about: Start) -> None:
    """What is not there yet: its parameters never change."""
    from mlflow.entities import Param

    absent = {key: value for key, value in about.flat_config.items() if key not in run.data.params}
    params = [Param(key, str(value)[:_PARAM_CHARACTERS]) for key, value in absent.items()]
    for first in range(0, len(params), _PARAMS):
        client.log_batch(run.info.run_id, params=params[first : first + _PARAMS])
