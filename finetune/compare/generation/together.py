"""Which questions a model may answer in one batch with the answers that each gets alone, found on a small model of its kind."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from finetune import version
from finetune.errors import BaseError, explained
from finetune.model import attention, base, rotary, tiny
from finetune.model.base.quiet import quiet
from finetune.store import cache
from finetune.training import arrangements
from finetune.training.arrangements import differs, rows_for
from finetune.training.counted import text_of_code

PADDED, LEVEL, ALONE = "padded", "level", "alone"
"""Of any lengths, padded on the left; of one length; one at a time."""
STEPS = 4  # tokens after each row: the first ones run on what the padded rows left in the cache


def together(directory: Path) -> str:
    """How questions come together for the model in a directory; asked once for each config."""
    ours = text_of_code(arrangements, attention, rotary, tiny)
    code = [Path(__file__).read_text(), *ours, *map(version, ("finetune", "torch", "transformers"))]
    facts = [json.loads((directory / "config.json").read_text()), code]
    return cache.found("batches", facts, lambda: _found(base.load_config(directory)))


def _found(config: PretrainedConfig) -> str:
    """By rows past every window, chunk and original context of the small model."""
    longest = max(getattr(config.get_text_config(), "max_position_embeddings", None) or 0, tiny.BEYOND)
    try:
        model = rotary.separate(tiny.model_like(config, longest + 1))
        rows = rows_for(model)[:3]
        alone = torch.cat([_logits(model, [row]) for row in rows])
        if differs(alone[1:], _logits(model, rows[1:])):
            return ALONE
        return LEVEL if differs(alone, _logits(model, rows)) else PADDED
    except BaseError:  # no small model of it can be made, or it cannot run so: alone is always right
        return ALONE


def _logits(model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    """The logits of the tokens after each row, (rows, STEPS, V), with a cache, as in use."""
    settings = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True
    )
    settings.pad_token_id = 0
    with torch.inference_mode(), quiet(), explained("transformers cannot generate with it", type(model).__name__):
        found = cast(Any, model).generate(
            **left_padded([row[0].tolist() for row in rows], 0), generation_config=settings
        )
    return torch.stack(found.logits, dim=1)


def left_padded(rows: list[list[int]], filler: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Rows of any lengths as `input_ids` and `attention_mask`, both (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
