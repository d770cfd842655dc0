"""Packed, padded and alone, a row has the same loss and the same gradients, and they are those of plain transformers."""

import math

import numpy as np
import pytest
import torch

from finetune.data.example import Example
from finetune.model.attention import PER_ROW
from finetune.model.base import load_model
from finetune.model.losses import chunked
from finetune.tasks.causal import collate_packed, collate_padded, filled, loss, score
from finetune.tasks.task import RowResults


@pytest.fixture(scope="module")
def models(tiny_base):
    """The tiny model as packing and as padding runs it."""
    return {collate_packed: load_model(tiny_base, attention=PER_ROW), collate_padded: load_model(tiny_base)}


def examples_of(lengths, seed=0):
    """Random rows in which about half the tokens, the last one always, are supervised."""
    chance = np.random.default_rng(seed)
    rows = [
        Example(chance.integers(3, 300, length).astype(np.int32), chance.random(length) < 0.5) for length in lengths
    ]
    for row in rows:
        row.supervised[-1] = True
    return rows


EXAMPLES = examples_of([7, 31, 2, 12, 31, 5])


def results(sums, tokens):
    return RowResults(np.arange(len(sums)), np.asarray(sums, dtype=np.float64), np.asarray(tokens))


def plain_losses(model, examples):
    """Summed loss and supervised tokens of each row by transformers' own `labels`."""
    sums, counts = [], []
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
        labels = tokens.masked_fill(~torch.from_numpy(example.supervised)[None], -100)
        counts.append(int(example.supervised[1:].sum()))
        sums.append(model(input_ids=tokens, labels=labels).loss * counts[-1])
    return torch.stack(sums), counts


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_the_loss_of_each_row_is_that_of_plain_transformers(models, collate):
    with torch.no_grad():
        total, rows = loss(models[collate], collate(EXAMPLES), chunked)
        expected, counts = plain_losses(models[collate_padded], EXAMPLES)
    assert rows.dtype == total.dtype == torch.float32
    torch.testing.assert_close(rows, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(total, expected.sum(), rtol=2e-6, atol=0)
    assert collate(EXAMPLES)["tokens_of_rows"] == counts


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_the_gradients_are_those_of_plain_transformers(models, collate):
    ours = gradients(models[collate], loss(models[collate], collate(EXAMPLES), chunked)[0])
    plain = gradients(models[collate_padded], plain_losses(models[collate_padded], EXAMPLES)[0].sum())
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=2e-5)


def test_packed_logits_are_those_of_each_row_alone(models):
    model, batch = models[collate_packed], collate_packed(EXAMPLES)
    with torch.no_grad():
        packed = model(**batch["model_inputs"], use_cache=False).logits[0]
        alone = [
            models[collate_padded](torch.from_numpy(row.tokens.astype(np.int64))[None]).logits[0] for row in EXAMPLES
        ]
    assert (packed - torch.cat(alone)).abs().max() < 2e-6


def test_a_row_is_blind_to_its_neighbours_to_the_bit(models):
    """Whatever stands beside a row of a packed sequence, its loss stays the same."""
    before, after = (examples_of([9, 14, 6], seed) for seed in (1, 2))
    after[1] = before[1]
    with torch.no_grad():
        rows = [loss(models[collate_packed], collate_packed(examples), chunked)[1] for examples in (before, after)]
    assert torch.equal(rows[0][1], rows[1][1])
    assert rows[0][0] != rows[1][0]


def test_a_packed_batch_tells_where_its_rows_are():
    first = Example(np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True]))
    second = Example(np.array([8, 9], dtype=np.int32), np.array([True, True]))
    batch = collate_packed([first, second])
    assert batch["model_inputs"]["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["model_inputs"]["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["model_inputs"]["row_bounds"] == [0, 3, 5]
    assert batch["positions_N"].tolist() == [1, 3]  # those that predict tokens 7 and 9
    assert batch["labels_N"].tolist() == [7, 9]
    assert batch["tokens_of_rows"] == [1, 1]


def test_a_packed_batch_is_filled_up_with_rows_that_nothing_is_learned_from():
    rows = [Example(np.array(tokens, dtype=np.int32), np.ones(len(tokens), bool)) for tokens in ([5, 6, 7], [8, 9])]
    batch = collate_packed(rows)
    inputs = (made := filled(batch, 12))["model_inputs"]
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, *[0] * 7]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0]]
    assert inputs["row_bounds"] == inputs["cu_seq_lens"].tolist() == [0, 3, 5, 8, 11, 12]
    assert all(made[name] is batch[name] for name in batch if name != "model_inputs")
    assert filled(batch, 5)["model_inputs"]["row_bounds"] == [0, 3, 5]


def test_a_padded_batch_is_filled_up_on_the_right():
    first = Example(np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True]))
    second = Example(np.array([8, 9], dtype=np.int32), np.array([True, True]))
    batch = collate_padded([first, second])
    assert batch["model_inputs"]["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["positions_N"].tolist() == [1, 3]
    assert batch["labels_N"].tolist() == [7, 9]


def test_one_row_packs_and_pads_alike(models):
    with torch.no_grad():
        sums = [
            loss(models[collate], collate(EXAMPLES[:1]), chunked)[0].item()
            for collate in (collate_packed, collate_padded)
        ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_the_figures_are_means_of_a_supervised_token():
    figures = score(results([2.0, 4.0], [1, 2]))
    assert figures == {"loss": 2.0, "perplexity": math.exp(2.0), "rows": 2, "tokens": 3, "loss_stderr": 0.0}
    one = score(results([3000.0], [3]))
    assert one["perplexity"] == math.inf and "loss_stderr" not in one


def test_the_standard_error_is_that_of_rows_drawn_at_random():
    drawn = np.random.default_rng(0)
    tokens = drawn.integers(1, 60, 4000)
    sums = tokens * drawn.normal(2.0, 0.5, 4000) + drawn.normal(0, 3, 4000)
    means = []
    for _ in range(400):
        rows = drawn.integers(0, 4000, 200)
        means.append(sums[rows].sum() / tokens[rows].sum())
    errors = []
    for _ in range(20):
        rows = drawn.integers(0, 4000, 200)
        errors.append(score(results(sums[rows], tokens[rows]))["loss_stderr"])
    assert np.median(errors) == pytest.approx(np.std(means), rel=0.1)
