"""The loss of a conversation's examples is that of each turn as inference would see it, computed with plain transformers."""

import pytest
import torch

from finetune.model.attention import PER_ROW
from finetune.model.base import load_model
from finetune.model.losses import chunked
from finetune.tasks.chat import TASK
from tests.zoo import oracle
from tests.zoo.catalog import ZOO
from tests.zoo.matrix import encode
from tests.zoo.rows import MORE, ROWS

CELLS = [
    ("chatml", "two turns", 1),
    ("qwen3", "reasoning, two turns", 2),
    ("qwen3.5", "tool call", 1),
    ("gpt-oss", "two turns", 2),
    ("glm-4", "parallel calls", 1),
    ("nemotron-3", "two turns", 2),
    ("gemma-4", "two turns", 2),
    ("granite-3.3", "three turns", 1),
]


@pytest.fixture(scope="module")
def models(tiny_base):
    """The tiny model as packing runs it, and as plain transformers does."""
    return load_model(tiny_base, attention=PER_ROW), load_model(tiny_base)


@pytest.mark.parametrize(("name", "kind", "count"), CELLS)
def test_the_loss_of_each_turn_is_the_one_at_inference(models, name, kind, count):
    specimen, row = ZOO[name], (ROWS | MORE)[kind]
    packed, plain = models
    examples = encode(specimen, row)
    assert len(examples) == count
    with torch.no_grad():
        _, found = TASK.loss(packed, TASK.collate_packed(examples), chunked)
        turns = torch.stack([_at_inference(specimen, plain, turn) for turn in _turns(specimen, row)])
    expected = turns if count == len(turns) else turns.sum()[None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _turns(specimen, row):
    possible, _ = oracle.readings(specimen, oracle.plain(row))
    return possible[0].turns


def _at_inference(specimen, model, turn):
    """How unlikely the answer is after the very prompt that inference sends."""
    prompt, answer = (
        specimen.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for text in (turn.prompt, turn.answers[0])
    )
    logits = model(input_ids=torch.cat([prompt, answer], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), answer[0], reduction="sum")
