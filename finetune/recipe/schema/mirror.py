"""The section `mirror`: a copy of a run in a bucket."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema, model_validator

from finetune.recipe.addresses import LIKE, PATTERN, is_place, problem_of
from finetune.recipe.schema.training import KeepWhole
from finetune.recipe.schema.values import Section, StepCadence

RUN_NAME = "{run}"


def _place(value: object) -> object:
    if not isinstance(value, str) or not is_place(value):
        raise ValueError(f"must be like {LIKE}")
    return value.rstrip("/")


class Mirror(Section):
    """A copy of the run in a bucket, made beside the training. The same command on a new machine resumes from it. An address is short for `{to: ADDRESS}`."""

    to: Annotated[str, BeforeValidator(_place), WithJsonSchema({"type": "string", "pattern": f"^{PATTERN}$"})]
    """The bucket and prefix: `s3://bucket/prefix`, `gs://bucket/prefix`, `hf://owner/name`, or a mounted folder like `file:///mnt/runs`. `{run}` stands for the name of the run directory. A mirror has one run."""
    every: StepCadence | None = None
    """Copy only commits at multiples of N steps, and the last one of each training. Default: every commit."""
    keep: KeepWhole = KeepWhole()
    """The commits to keep in the mirror, whatever `checkpoint.keep` says about this disk."""

    @model_validator(mode="after")
    def _has_no_credentials(self) -> "Mirror":
        # Said of the section, because what is said of a value shows it.
        if problem := problem_of(self.to):
            raise ValueError(f"`to` {problem}")
        return self

    def place_of(self, run_name: str) -> str:
        """The address for a run directory of this name."""
        return self.to.replace(RUN_NAME, run_name)


def named(value: object) -> object:
    if isinstance(value, str):
        return {"to": value}
    if not isinstance(value, Mapping | Mirror):
        raise ValueError("must be an address like `s3://bucket/prefix`, or a section with the key `to`")
    return value
