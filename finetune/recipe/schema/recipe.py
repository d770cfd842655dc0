"""The whole recipe: all sections together."""

from typing import Annotated

from pydantic import BeforeValidator, ValidationInfo, field_validator, model_validator

from finetune.recipe.schema.adapters import Adapter
from finetune.recipe.schema.base import Base
from finetune.recipe.schema.data import Data
from finetune.recipe.schema.evaluation import Evaluate
from finetune.recipe.schema.mirror import Mirror, named
from finetune.recipe.schema.optimizers import Optimizer
from finetune.recipe.schema.package import Package, Publish
from finetune.recipe.schema.rules import PartlyRead, problems
from finetune.recipe.schema.tasks import Task
from finetune.recipe.schema.trackers import Track, as_a_list
from finetune.recipe.schema.training import Checkpoint, Guard, Train
from finetune.recipe.schema.values import Section, Short


class Recipe(Section):
    """A fine-tuning run, declared."""

    base: Base
    task: Task
    data: Data
    adapter: Adapter | None = None
    """Without this section you train every weight."""
    optimizer: Optimizer
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    track: Track = []
    """Where the figures of a training also go: names like `tensorboard`, or sections with keys. The journal has them all, whatever you choose here."""
    mirror: Annotated[Mirror, BeforeValidator(named), Short("to")] | None = None
    """A copy of the run in a bucket. Without this section a run is only on your disk."""
    package: Package = Package()
    publish: Publish | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether only matrices beside frozen weights of the base are trained."""
        return self.adapter is not None and self.adapter.is_peft

    @model_validator(mode="before")
    @classmethod
    def _of_older_keys(cls, given: object) -> object:
        return as_a_list(given)

    @field_validator("*")
    @classmethod
    def _collect(cls, section: object, info: ValidationInfo) -> object:
        """Shows the caller's context each section that is right, so that `load` can ask the rules beside a broken one."""
        if info.context is not None and info.field_name is not None:
            info.context[info.field_name] = section
        return section

    @model_validator(mode="after")
    def _fit_together(self) -> "Recipe":
        if found := problems(PartlyRead(**dict(self))):
            raise ValueError("\n".join(found))
        return self
