"""Packed attention sees within a row, backwards, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.errors import BaseError
from finetune.model import attention
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


def test_short_rows_of_one_length_are_one_call_and_give_the_same(monkeypatch):
    inputs, calls = tensors(), []
    whole = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(len(a[0])) or whole(*a, **k))
    bounds = [0, 4, 6, 8, 10, 12, 13, 14, 15, 16]
    output, _ = per_row(torch.nn.Module(), *inputs, None, row_bounds=bounds)
    assert calls == [1, 4, 4]
    torch.testing.assert_close(output, masked(*inputs, bounds), rtol=1e-5, atol=1e-6)


def test_a_value_may_be_shorter_than_a_key():
    query, key, value = tensors()
    inputs = [query, key, value[..., :5]]
    output, _ = per_row(torch.nn.Module(), *inputs, None, row_bounds=BOUNDS)
    torch.testing.assert_close(output, masked(*inputs, BOUNDS), rtol=1e-5, atol=1e-6)


def kernel_of_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    page_table=None,
):
    """The variable-length kernel as torch 2.11 declares it, which takes fewer key heads unasked."""
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    return masked(*heads_first, cu_seq_q.tolist(), scale)[0]


def kernel_of_2_13(*tensors, enable_gqa=False, **settings):
    assert enable_gqa == (tensors[0].shape[1] != tensors[1].shape[1])
    return kernel_of_2_11(*tensors, **settings)


@pytest.mark.parametrize("kernel", [kernel_of_2_11, kernel_of_2_13])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_for_all_rows_is_called_as_each_torch_declares_it(kernel, key_heads, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_kernel_type", lambda query, *_: query.dtype)
    inputs = tensors(key_heads=key_heads)
    cu_seq_lens = torch.tensor(BOUNDS, dtype=torch.int32)
    output, _ = per_row(torch.nn.Module(), *inputs, None, row_bounds=BOUNDS, cu_seq_lens=cu_seq_lens)
    torch.testing.assert_close(output, masked(*inputs, BOUNDS), rtol=1e-5, atol=1e-6)


def test_fp32_on_cuda_repeats_key_heads_and_gives_the_same(monkeypatch):
    with FakeTensorMode():
        on_cuda = torch.empty(1, device="cuda")
        assert attention._takes_groups(on_cuda.bfloat16()) and not attention._takes_groups(on_cuda)
    monkeypatch.setattr(attention, "_takes_groups", lambda query: False)
    heads, whole = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: heads.append(a[1].shape[1]) or whole(*a, **k)
    )
    inputs = tensors(key_heads=2)
    output, _ = per_row(torch.nn.Module(), *inputs, None, row_bounds=BOUNDS)
    expected = masked(*inputs, BOUNDS)
    assert heads[:-1] == [4] * 4
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(result.sum(), inputs) for result in (output, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_what_a_model_adds_to_attention_and_is_unknown_here_is_refused():
    inputs = tensors()
    with pytest.raises(BaseError) as caught:
        per_row(torch.nn.Module(), *inputs, None, row_bounds=BOUNDS, s_aux=torch.zeros(4))
    assert "its attention takes s_aux, which packing does not know" in str(caught.value)


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "use_cache": False,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12, "hidden_activation": "gelu_pytorch_tanh"}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases and heads of 12": ("llama", {"attention_bias": True, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "mistral that looks 4 tokens back": ("mistral", {"sliding_window": 4}),
    "gemma2, soft-capped": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "sliding_window": 64}),
    "gemma2, soft-capped, 4 tokens back": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "sliding_window": 4}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[9, 5, 5, 5, 1, 1], [7, 7], [13], [1]])
def test_packed_logits_and_gradients_are_those_of_each_row_alone(name, lengths):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | changes), attn_implementation="eager")
    rows = [torch.randint(0, 97, (1, length)) for length in lengths]
    seeds = [torch.randn(1, length, 97) for length in lengths]
    expected = [model(input_ids=row, use_cache=False).logits for row in rows]
    sum((logits * seed).sum() for logits, seed in zip(expected, seeds, strict=True)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(PER_ROW)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(input_ids=torch.cat(rows, 1), position_ids=positions, row_bounds=bounds, use_cache=False).logits
    (packed * torch.cat(seeds, 1)).sum().backward()
    torch.testing.assert_close(packed, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-4)
