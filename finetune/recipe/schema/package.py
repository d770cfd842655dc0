"""The sections `package` and `publish`."""

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
    """Weights over this size are split into several files."""
    license: str | None = None
    """The licence of the package, by its id on the Hub (`apache-2.0`, `other`). Default: the base's. finetune refuses a licence that the base's does not allow."""
    license_name: str | None = None
    """The name of the licence `other`."""
    license_link: str | None = None
    """A link to the text of the licence `other`."""


class Publish(Section):
    """The target of the package."""

    repo: HubId
    """The Hub repository, `owner/name`."""
    private: bool = True
    """Whether the repository is private; with `true`, an existing public one is refused."""
    milestones: StepCadence | None = None
    """Also publish every checkpoint at a multiple of this many steps while you train, each on its own branch like `step-00000500`."""
