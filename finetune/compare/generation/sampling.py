"""Samples that depend on the seed and the question alone, and never on what is beside it in a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from finetune.compare.generation.settings import Settings
from finetune.plan.row_order import derive


class Sampler(LogitsProcessor):
    """Adds Gumbel noise to logits, so that the largest one is a sample of their softmax (arXiv 1411.0030).

    `torch.multinomial` would draw for all rows of a batch from one stream. Here each row has its own.
    """

    def __init__(self, settings: Settings, seeds: Sequence[int], device: torch.device):
        self._temperature = settings.temperature
        self._narrowed = TopPLogitsWarper(settings.top_p) if settings.top_p < 1 else None
        self._sources = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) of the next token to logits whose largest is the sampled one."""
        scores = scores / self._temperature
        if self._narrowed:
            scores = self._narrowed(input_ids, scores)
        drawn = torch.stack(
            [torch.empty_like(row).exponential_(generator=self._sources[at]) for at, row in enumerate(scores)]
        )
        # some versions of torch draw an exact 0, whose logarithm would win against every logit
        return scores - drawn.clamp_min_(torch.finfo(drawn.dtype).tiny).log()


def seed_of(settings: Settings, sample: int, question: Sequence[int]) -> int:
    """The seed of one answer; two equal questions get equal answers."""
    return derive(settings.seed, sample, *question)
