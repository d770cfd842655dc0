"""The section `adapter`: one class an adapter, with its own keys and with what is known of it without torch.

What is done to a model is in `model/adapters/`, in the file of the adapter's name.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from finetune.recipe.schema.values import Names, Section, members


class AdapterFacts(Section):
    """What every adapter states of itself; none of this is a key."""

    title: ClassVar[str]
    """What a model card calls the method."""
    tags: ClassVar[tuple[str, ...]]
    """Of a model card."""
    is_peft: ClassVar[bool]
    """Whether peft puts matrices in fp32 beside a base that stays as it is: checkpoints hold these alone, and they can be packaged alone."""
    tensors_beside_a_matrix: ClassVar[int]
    """How many it trains for each matrix that it reaches; 0 where it trains the base's own."""


class LoraAdapter(AdapterFacts):
    """Low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    name: Literal["lora"]
    rank: PositiveInt = 16
    """Rank of the added matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the first added matrix."""
    targets: Names = ["all-linear"]
    """Which linear layers get matrices: `all-linear` (all but the output head), or names like `q_proj` or `shared_experts.*`, where `*` matches any characters. `all-linear` also reaches fused experts in families where peft counts them; `plan` lists what is reached. `[]` for none."""
    parameters: Names = []
    """Further matrices that get them and are no layers of their own, like `experts.gate_up_proj` and `experts.down_proj`, or `experts.*`: a family's experts in one tensor. `dropout` must then be 0. peft calls them `target_parameters`."""
    exclude: Names = []
    """Layers and matrices that get none, by name or pattern, whatever `targets` says."""
    layers: list[NonNegativeInt] = []
    """The numbers of the only decoder layers that get them, from 0. Default: all."""

    @model_validator(mode="after")
    def _something(self) -> "LoraAdapter":
        if not self.targets and not self.parameters:
            raise ValueError("has neither `targets` nor `parameters`; name one")
        return self

    title: ClassVar = "LoRA"
    tags: ClassVar = ("lora",)
    is_peft: ClassVar = True
    tensors_beside_a_matrix: ClassVar = 2


class FrozenAdapter(AdapterFacts):
    """A full fine-tune with some frozen tensors."""

    name: Literal["frozen"]
    freeze: Names = Field(min_length=1)
    """Patterns of parameter names that do not change, like `model.embed_tokens.*` (`*` matches any characters)."""

    title: ClassVar = "fine-tuning with some weights frozen"
    tags: ClassVar = ()
    is_peft: ClassVar = False
    tensors_beside_a_matrix: ClassVar = 0


Adapter = Annotated[LoraAdapter | FrozenAdapter, Field(discriminator="name")]

SECTIONS: dict[str, type[AdapterFacts]] = members(Adapter)
