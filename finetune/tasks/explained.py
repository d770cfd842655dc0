"""Examples with a reason for each token, for people who look at rows; of a task that has no explainer, by its masks alone."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.example import Example, Row
from finetune.tasks.task import Encode, Explain, Explained

FIRST = "not learnt: the first token of an example, which nothing predicts"


def by_masks(tokenizer: PreTrainedTokenizerBase, encode: Encode) -> Explain:
    """A function from a row and its place to its examples. They are cut already, and the text is what the tokens spell."""

    def explain(row: Row, place: str) -> list[Explained]:
        [examples] = encode([row], [place])
        return [_explained(tokenizer, example) for example in examples]

    return explain


def _explained(tokenizer: PreTrainedTokenizerBase, example: Example) -> Explained:
    tokens, supervised = example.tokens, example.supervised
    pieces = [str(tokenizer.decode([token])) for token in tokens.tolist()]
    edges = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    reasons = [FIRST, *map(_reason, supervised[1:].tolist())]
    offsets = np.stack([edges[:-1], edges[1:]], axis=1)
    return Explained("".join(pieces), tokens, offsets, supervised, reasons[: len(tokens)], len(tokens))


def _reason(is_learnt: bool) -> str:
    return "learnt: this task learns it" if is_learnt else "not learnt: the row masks it"
