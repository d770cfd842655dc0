"""The feed-forward of a layer on pieces of a sequence gives what it gives at once, and keeps less."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.errors import BaseError
from finetune.model import attention, decoder_layers, feed_forward
from finetune.model.adapters import apply
from finetune.recipe.schema import LoraAdapter

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
BOUNDS = [0, 9, 30, 100]


def model_of(kind, settings=None, adapter=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | (settings or {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PER_ROW)
    return apply(model, adapter).train()


def gradients(model, dtype=None):
    """Of one packed sequence: loss, gradients, and the bytes that were kept for the backward pass."""
    kept = {}
    inputs = {
        "input_ids": (torch.arange(BOUNDS[-1]) * 7 % 300)[None],
        "position_ids": torch.cat([torch.arange(end - start) for start, end in zip(BOUNDS, BOUNDS[1:], strict=False)])[
            None
        ],
    }

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = model(**inputs, row_bounds=BOUNDS, use_cache=False).logits.float().square().mean()
        loss.backward()
    return loss.item(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, kept


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("adapter", [None, LoraAdapter(name="lora", rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi3", "gpt_neox"])
def test_pieces_give_the_same_loss_and_gradients(kind, adapter, is_checkpointed):
    expected, found = model_of(kind, adapter=adapter), model_of(kind, adapter=adapter)
    assert feed_forward.in_pieces(found, 16) == found.config.num_hidden_layers
    if is_checkpointed:
        decoder_layers.checkpoint_activations(found)
    (loss, grads, all_kept), (other, others, kept) = gradients(expected), gradients(found)
    assert other == pytest.approx(loss, rel=1e-6) and others.keys() == grads.keys()
    for name, each in grads.items():
        assert (others[name] - each).norm() <= 1e-5 * each.norm() + 1e-9, name
    assert sum(kept.values()) < 0.9 * sum(all_kept.values())


def test_what_fits_one_piece_is_the_same_to_the_bit():
    expected, found = model_of("llama"), model_of("llama")
    feed_forward.in_pieces(found, 100)
    (loss, grads, _), (other, others, _) = gradients(expected), gradients(found)
    assert loss == other and all(torch.equal(grads[name], others[name]) for name in grads)


def test_pieces_of_bf16_products_are_equal_to_their_rounding():
    expected, found = model_of("llama"), model_of("llama")
    feed_forward.in_pieces(found, 16)
    (loss, grads, _), (other, others, _) = gradients(expected, torch.bfloat16), gradients(found, torch.bfloat16)
    assert other == pytest.approx(loss, rel=1e-3)
    assert all((others[name] - each).norm() <= 0.02 * each.norm() for name, each in grads.items())


def test_padded_rows_count_all_their_tokens():
    seen = []
    forward = feed_forward._split(lambda hidden: seen.append(tuple(hidden.shape)) or hidden, 16)
    with torch.no_grad():
        hidden = torch.randn(4, 10, 2)
        assert torch.equal(forward(hidden), hidden)
    assert seen == [(4, 4, 2), (4, 4, 2), (4, 2, 2)]


def test_beside_experts_only_the_shared_ones_run_in_pieces():
    shared = {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}
    found = model_of("qwen2_moe", EXPERTS | shared)
    assert feed_forward.in_pieces(found, 16) == 2
    assert all(
        "_split" not in str(layer.mlp.forward) and "_split" in str(layer.mlp.shared_expert.forward)
        for layer in found.model.layers
    )
    expected, grads, _ = gradients(model_of("qwen2_moe", EXPERTS | shared))
    loss, others, _ = gradients(found)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all((others[name] - each).norm() <= 1e-5 * each.norm() + 1e-9 for name, each in grads.items())


@pytest.mark.parametrize("kind", ["qwen3_moe", "opt", "mamba"])
def test_a_base_without_such_a_part_is_refused(kind):
    settings = {"qwen3_moe": EXPERTS, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}.get(kind)
    with pytest.raises(BaseError, match="train.mlp_chunk_tokens: the layers of this base have no feed-forward"):
        feed_forward.in_pieces(model_of(kind, settings), 16)


def test_looking_for_it_leaves_random_numbers_and_modes_as_they_were():
    model = model_of("llama")
    state = torch.random.get_rng_state()
    feed_forward.in_pieces(model, 16)
    assert torch.equal(torch.random.get_rng_state(), state) and all(each.training for each in model.modules())
