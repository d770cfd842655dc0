"""The section `base`."""

from typing import Literal

from pydantic import Field

from finetune.recipe.schema.values import HubId, Section


class Base(Section):
    """The checkpoint that training starts from."""

    checkpoint: str = Field(min_length=1)
    """A Hub id (`owner/name`), a directory (of transformers, Trainer or peft), a run's checkpoint (`runs/a@best`), or `package:NAME/file.gguf` inside an installed Python package. An adapter is merged onto the base that it names."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint; the plan pins it to a commit. Default: the main branch."""
    origin: HubId | None = None
    """The Hub checkpoint that a local base is equal to (`owner/name`); with it an adapter of a local base can be published."""
    quantization: Literal["nf4"] | None = None
    """`nf4`: frozen linear layers in 4 bits beneath a LoRA adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). An eighth of their fp32 memory; every product dequantizes first, and what is packaged lies on the unquantized base. Needs bitsandbytes."""
