"""The section `base`."""

from typing import Literal

from pydantic import Field

from finetune.recipe.schema.rope import Rope
from finetune.recipe.schema.values import HubId, Section


class Base(Section):
    """The checkpoint at the start of training."""

    checkpoint: str = Field(min_length=1)
    """A Hub id (`owner/name`), a directory (of transformers, Trainer or peft), a run's checkpoint (`runs/a@best`), or a GGUF file: `path/model.gguf`, `owner/name/file.gguf` on the Hub, or `package:NAME/file.gguf` inside an installed Python package. An adapter is merged onto its base."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint; the plan pins it to a commit. Default: the main branch."""
    origin: HubId | None = None
    """The Hub checkpoint equal to your local base (`owner/name`). You need it to publish an adapter of a local base."""
    random_weights: int | None = Field(default=None, ge=0, lt=2**63)
    """A seed: draws new weights with it, as for pretraining, tests and benchmarks. Of the checkpoint you then need config and tokenizer only. Not with an adapter."""
    quantization: Literal["nf4", "int8", "stored", "dequantized"] | None = None
    """Frozen linear layers in few bits under a LoRA adapter. `nf4`: 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), an eighth of their fp32 memory; every product dequantizes first. `int8`: 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339), a quarter. Your package lies on the unquantized base. `stored`: as the files of bitsandbytes store them, the default for such a base under LoRA. `dequantized`: the numbers that quantized files stand for, the default otherwise. All but the last need bitsandbytes."""
    rope: Rope | None = None
    """Stretch the rotary positions, like `{rope_type: yarn, factor: 4}`, so that `task.max_length` may go beyond the base's positions. Default: as the base's config says."""
