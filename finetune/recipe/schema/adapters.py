"""The section `adapter`: one class an adapter, with that adapter's own keys."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from finetune.recipe.schema.values import Names, Section


class LoraAdapter(Section):
    """Low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    name: Literal["lora"]
    rank: PositiveInt = 16
    """Rank of the added matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the first added matrix."""
    targets: Names = ["all-linear"]
    """Which linear layers get matrices: `all-linear` (all but the output head), or names like `q_proj`."""


class FrozenAdapter(Section):
    """A full fine-tune with some tensors left as they are."""

    name: Literal["frozen"]
    freeze: Names = Field(min_length=1)
    """Patterns of parameter names that do not change, like `model.embed_tokens.*` (`*` matches any characters)."""


Adapter = Annotated[LoraAdapter | FrozenAdapter, Field(discriminator="name")]
