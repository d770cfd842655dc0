"""Follows answers token by token: where each ends, and what of it can be shown already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from finetune.compare.generation.answerer import Answerer
from finetune.compare.generation.settings import Settings

Listener = Callable[[int, int, str], None]
"""Gets the question, the sample, and all text of that answer so far."""
CONTEXT = 8  # tokens before a text that decide how its first ones are spelt
UNFINISHED = "\ufffd"
"""What a decoder makes of bytes that are no character yet."""


@dataclass
class Answer:
    """An answer while it is written."""

    question: int
    sample: int
    before: Sequence[int]
    """The last tokens of the question."""
    tokens: list[int] = field(default_factory=list)
    """With the stop token."""
    text: str = ""
    is_stopped: bool = False


class Watch(StoppingCriteria):
    """Ends each row of a batch at a stop token or a stop text, and all of them when `is_over`."""

    def __init__(
        self,
        answerer: Answerer,
        answers: Sequence[Answer],
        settings: Settings,
        listen: Listener | None,
        is_over: Callable[[], bool],
    ):
        self._answerer, self._answers, self._stop = answerer, answers, settings.stop
        self._listen, self._is_over = listen, is_over
        self.failed: OSError | None = None
        """What writing to the listener raised: it is not about the model, so nothing around transformers may explain it."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Tokens (B, T) to which of the rows are at their end, (B,)."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
            if not answer.is_stopped:
                self._take(answer, token)
        is_over = self.failed is not None or self._is_over()
        return torch.tensor([is_over or answer.is_stopped for answer in self._answers], device=input_ids.device)

    def _take(self, answer: Answer, token: int) -> None:
        answer.tokens.append(token)
        answer.is_stopped = token in self._answerer.stops
        if not (self._listen or self._stop):
            return
        text = text_of(self._answerer.tokenizer, answer, self._answerer.stops)
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            answer.is_stopped = True
        answer.text = text[: min(found, default=len(text))]
        if self._listen:
            try:
                self._listen(answer.question, answer.sample, self._shown(answer))
            except OSError as error:
                self.failed = error

    def _shown(self, answer: Answer) -> str:
        """The text without an end that may still become another character, or a stop text."""
        if answer.is_stopped:
            return answer.text
        text = answer.text.rstrip(UNFINISHED)
        begun = (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return text[: len(text) - max(begun, default=0)]


def text_of(tokenizer: PreTrainedTokenizerBase, answer: Answer, stops: frozenset[int]) -> str:
    """The text of an answer as it goes on after its question: by themselves, the first tokens may lose a blank."""
    tokens = answer.tokens[:-1] if answer.tokens and answer.tokens[-1] in stops else answer.tokens
    before = str(tokenizer.decode([*answer.before], skip_special_tokens=True))
    whole = str(tokenizer.decode([*answer.before, *tokens], skip_special_tokens=True))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(tokens, skip_special_tokens=True))
