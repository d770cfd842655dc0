"""The sections `package` and `publish`: what is made of a run afterwards."""

from typing import Literal

from pydantic import PositiveInt

from finetune.recipe.schema.values import HubId, Section, StepCadence


class Package(Section):
    """What `finetune package` writes."""

    form: Literal["merged", "adapter"] = "merged"
    """Whole weights, or the adapter alone."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Type of the packaged weights. Default: `train.precision`."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    """Weights over this size are divided into several files."""
    license: str | None = None
    """The licence of the package, by its id on the Hub (`apache-2.0`, `other`). Default: the base's. One that the base's licence does not allow is refused."""
    license_name: str | None = None
    """The name of the licence `other`."""
    license_link: str | None = None
    """Where the text of the licence `other` is."""


class Publish(Section):
    """Where the package goes."""

    repo: HubId
    """The Hub repository, `owner/name`."""
    private: bool = True
    """Whether the repository is private: one that is there and public is refused."""
    milestones: StepCadence | None = None
    """Also publish the checkpoints at multiples of so many steps, while the training goes on, each on a branch `step-00000500`."""
