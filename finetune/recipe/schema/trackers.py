"""The section `track`: one class a tracker, with its own keys.

How a tracker is written to is in `training/trackers/`, in the file of its name.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, cast

from pydantic import BeforeValidator, Discriminator, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from finetune.recipe.schema.values import Section, StepCadence, listed, members


class TrackerFacts(Section):
    """What every tracker has."""

    name: str
    every: StepCadence | None = None
    """Log every N steps, like `10 steps`, and each evaluated step. Default: every step."""

    package: ClassVar[str | None] = None
    """The Python package of its client, which the extra of the tracker's name installs."""


class CsvTracker(TrackerFacts):
    """A table in the run directory, `figures.csv`, for a spreadsheet or a plot."""

    name: Literal["csv"]


class TensorboardTracker(TrackerFacts):
    """Event files in the run directory, in `tensorboard/`."""

    name: Literal["tensorboard"]

    package: ClassVar = "tensorboard"


class WandbTracker(TrackerFacts):
    """Weights & Biases; with `WANDB_MODE=offline` in your environment it writes files in the run directory, in `trackers/wandb/`."""

    name: Literal["wandb"]
    project: str | None = None
    """The project. Default: that of `WANDB_PROJECT`."""
    entity: str | None = None
    """The user or team. Default: that of `WANDB_ENTITY`, or yours."""

    package: ClassVar = "wandb"


class MlflowTracker(TrackerFacts):
    """MLflow, on the server, database or folder of `MLFLOW_TRACKING_URI`."""

    name: Literal["mlflow"]
    experiment: str | None = None
    """The experiment, made if it is not there. Default: that of `MLFLOW_EXPERIMENT_NAME`, or `Default`."""

    package: ClassVar = "mlflow"


class TrackioTracker(TrackerFacts):
    """trackio, on this machine."""

    name: Literal["trackio"]
    project: str = "finetune"
    """The project."""

    package: ClassVar = "trackio"


class AimTracker(TrackerFacts):
    """Aim, in a repository on this machine or on a server."""

    name: Literal["aim"]
    repository: str = "."
    """The folder with the repository, made if it is not there, or the address of a server (`aim://host:53800`)."""
    experiment: str | None = None
    """The experiment. Default: `default`."""

    package: ClassVar = "aim"


class _OrName:
    """In the JSON schema too, the name of a tracker may stand for its section."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": [*SECTIONS]}, handler(schema)]}


def _named(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping | TrackerFacts):
        raise ValueError("must be the name of a tracker, or a section with its keys")
    return value


Tracker = Annotated[
    CsvTracker | TensorboardTracker | WandbTracker | MlflowTracker | TrackioTracker | AimTracker,
    Discriminator("name"),
]
Track = Annotated[list[Annotated[Tracker, BeforeValidator(_named), _OrName()]], BeforeValidator(listed)]

SECTIONS = cast(dict[str, type[TrackerFacts]], members(Tracker))


def as_a_list(recipe: object) -> object:
    """A recipe, or that of an older plan, with its older key `trackers`, a section for each tracker, as `track`."""
    if not isinstance(recipe, Mapping) or "track" in recipe or not isinstance(recipe.get("trackers"), Mapping):
        return recipe
    sections = recipe["trackers"].items()
    track = [{"name": name, **section} for name, section in sections if isinstance(section, Mapping)]
    return {key: value for key, value in recipe.items() if key != "trackers"} | {"track": track}
