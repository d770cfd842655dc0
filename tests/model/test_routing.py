"""Routers: their load is counted, and their balance is transformers' own."""

import pytest
import torch
from transformers import AutoConfig

from finetune.errors import BaseError
from finetune.model import losses
from finetune.model.adapters import apply
from finetune.model.routing import Routers, Work, coefficient_of, watched
from finetune.model.tiny import model_like
from finetune.recipe.schema import LoraAdapter

TOKENS = torch.arange(3, 40)[None] * 7 % 300
WITH_BALANCE = ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "olmoe", "phimoe", "qwen2_moe", "minimax_m2", "jamba")


def small(kind, **settings):
    return model_like(AutoConfig.for_model(kind, **settings), max_length=64)


def ours(model, routers, tokens, lengths=None, share=1.0, scale=1.0):
    """Loss, and balance beside it, of a watched forward."""
    with routers.watching():
        loss, _ = losses.full(model, {"input_ids": tokens}, torch.arange(36), tokens[0, 1:])
    return loss, routers.added(Work(lengths or [tokens.numel()], share, scale))


@pytest.mark.parametrize("kind", WITH_BALANCE)
def test_the_balance_and_its_gradients_are_those_of_transformers(kind):
    model, plain = small(kind), small(kind)
    routers = Routers(model, 0.25)
    loss, balance = ours(model, routers, TOKENS, scale=36.0)
    ((loss + balance) / 36).backward()
    expected = plain(TOKENS, labels=TOKENS, output_router_logits=True, use_cache=False)
    assert balance.item() == pytest.approx(36 * 0.25 * expected.aux_loss.item(), rel=1e-6)
    assert routers.balance_of(routers.take().tolist()) == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    bare = plain(TOKENS, labels=TOKENS, use_cache=False)
    (bare.loss + 0.25 * expected.aux_loss).backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        if two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_padding_neither_counts_nor_is_balanced():
    model = small("qwen3_moe")
    routers, padded = Routers(model, 1.0), torch.zeros(2, 37, dtype=torch.long)
    padded[0], padded[1, :9] = TOKENS[0], TOKENS[0, :9]
    _, balance = ours(model, routers, padded, [37, 9])
    counts = routers.load(routers.take().tolist())
    mask = (torch.arange(37)[None] < torch.tensor([[37], [9]])).long()
    expected = model(padded, attention_mask=mask, output_router_logits=True, use_cache=False)
    assert balance.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert list(counts) == ["layers.0", "layers.1"] and all(sum(each) == 2 * 46 for each in counts.values())


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama4_text", "gpt_oss", "glm4_moe"])
def test_each_token_is_counted_for_each_of_its_experts(kind):
    shared = {"num_hidden_layers": 2, "first_k_dense_replace": 1} if kind in ("deepseek_v3", "glm4_moe") else {}
    model = apply(small(kind, **shared), LoraAdapter(name="lora", rank=2))
    routers = watched(model, "off", is_compiled=False)
    ours(model, routers, TOKENS)
    with torch.no_grad():
        model(TOKENS, use_cache=False)  # unwatched
    counts = routers.load(routers.take().tolist())
    assert counts and all(sum(each) == 37 * routers.top_k for each in counts.values())
    assert not routers.take().any()


def test_checkpointed_activations_are_counted_once_and_give_the_same_gradients():
    found = []
    for is_checkpointed in (False, True):
        model = small("qwen3_moe").train()
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        routers = Routers(model, 1.0)
        loss, balance = ours(model, routers, TOKENS)
        (loss + balance).backward()
        found.append((routers.take(), [each.grad for each in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_what_has_no_balance_is_refused_by_name():
    with pytest.raises(BaseError, match="LlamaForCausalLM has no load-balancing loss"):
        watched(small("llama"), "base", is_compiled=False)
    with pytest.raises(BaseError, match="train.router_loss|DeepseekV3ForCausalLM has no load-balancing loss"):
        coefficient_of(small("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=1), 0.1)
    assert watched(small("llama"), "off", is_compiled=False) is None
    assert watched(small("qwen3_moe"), "off", is_compiled=True) is None
    assert coefficient_of(small("qwen3_moe", router_aux_loss_coef=0.125), "base") == 0.125
