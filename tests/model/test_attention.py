"""Packed attention sees within a row, backwards, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from finetune.errors import BaseError
from finetune.model.attention import PER_ROW, per_row

BOUNDS = [0, 3, 4, 9, 16]


def tensors(heads=4, key_heads=4, length=16, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, length, size, generator=generator, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]


def masked(query, key, value, bounds, scaling=None):
    """The same by one dense mask: causal, and block-diagonal in rows."""
    rows = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    mask = (rows[:, None] == rows[None]) & torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
    ).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_by_rows_equals_a_block_diagonal_mask_and_so_do_its_gradients(key_heads, scaling):
    inputs = tensors(key_heads=key_heads)
    output, weights = per_row(torch.nn.Module(), *inputs, None, scaling=scaling, row_bounds=BOUNDS)
    expected = masked(*inputs, BOUNDS, scaling)
    assert output.shape == (1, 16, 4, 8) and output.is_contiguous() and weights is None
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(result, inputs, seed) for result in (output, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_row_is_blind_to_the_others_to_the_bit():
    query, key, value = (tensor.detach() for tensor in tensors())
    before, _ = per_row(torch.nn.Module(), query, key, value, None, row_bounds=BOUNDS)
    key[:, :, :4], value[:, :, 9:] = 1e6, float("nan")
    after, _ = per_row(torch.nn.Module(), query, key, value, None, row_bounds=BOUNDS)
    assert torch.equal(before[:, 4:9], after[:, 4:9])


def test_without_bounds_it_is_one_causal_sequence():
    inputs = [tensor.detach() for tensor in tensors()]
    output, _ = per_row(torch.nn.Module(), *inputs, None)
    torch.testing.assert_close(output, masked(*inputs, [0, 16]), rtol=1e-5, atol=1e-6)


def test_dropout_acts():
    inputs = [tensor.detach() for tensor in tensors()]
    torch.manual_seed(0)
    dropped, _ = per_row(torch.nn.Module(), *inputs, None, dropout=0.5, row_bounds=BOUNDS)
    whole, _ = per_row(torch.nn.Module(), *inputs, None, row_bounds=BOUNDS)
    assert not torch.allclose(dropped, whole)


def test_a_base_whose_attention_has_a_part_that_is_unknown_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.set_attn_implementation(PER_ROW)
    with pytest.raises(BaseError) as caught:
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    assert str(caught.value) == (
        "Gemma2Attention: its attention takes softcap, which packing does not know\nhint: set task.packing: false"
    )
