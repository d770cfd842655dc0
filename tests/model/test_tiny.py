"""A small model has every sort of layer of its base, and what ends within a base's rows ends within the small model's."""

import pytest
import torch
from transformers import AutoConfig

from finetune.errors import BaseError
from finetune.model import losses, tiny


def small(kind, max_length=64, **settings):
    return tiny.model_like(AutoConfig.for_model(kind, **settings), max_length)


def test_every_sort_of_layer_is_there():
    model = small("qwen3_next")
    assert set(model.config.layer_types) == {"linear_attention", "full_attention"}
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000


def test_a_layer_of_other_sizes_than_the_rest_is_there():
    apart = {4: {"intermediate_size": 32}}
    small = tiny.shrunk(AutoConfig.for_model("llama", num_hidden_layers=6, per_layer_config=apart), 64)
    assert small.num_hidden_layers == 2
    assert small.to_dict()["per_layer_config"] == {"1": {"intermediate_size": 32}}


def test_the_numbers_of_all_layers_keep_no_layer():
    config = small("llama4_text").config
    assert config.num_hidden_layers == 2 and config.moe_layers == [0, 1]
    assert set(config.layer_types) == {"chunked_attention", "full_attention"}


def test_stacks_have_as_few_layers_as_a_model_without():
    assert small("hrm_text").config.num_layers_per_stack == 2


@pytest.mark.parametrize(("max_length", "end"), [(2048, tiny.BEYOND), (4096, tiny.BEYOND), (4097, tiny.EDGE)])
def test_a_window_ends_within_the_small_rows_if_it_ends_within_the_bases(max_length, end):
    assert small("mistral", max_length, sliding_window=4096).config.sliding_window == end


def test_the_original_context_of_a_long_one_is_shrunk_where_it_is_nested():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "phi3", rope_parameters=rope | {"original_max_position_embeddings": 4096}, hidden_size=32, num_attention_heads=4
    )
    shrunk = tiny.shrunk(config, max_length=8192)
    assert shrunk.rope_parameters["original_max_position_embeddings"] == tiny.EDGE


def test_it_is_the_same_each_time_and_leaves_random_numbers_as_they_were():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = small("gemma2"), small("gemma2")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_in_fp32_whatever_the_files_of_the_base_are_in(dtype):
    assert {each.dtype for each in small("gemma2", dtype=dtype).parameters()} == {torch.float32}


def test_what_cannot_be_made_is_one_error():
    with pytest.raises(BaseError, match=r"xmod: cannot be made small \(ValueError: Input language unknown"):
        small("xmod")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("llama", None),
        ("mamba2", None),
        ("llama4_text", "its decoder gives no hidden states"),
        ("xlstm", "its logits are not its head on its decoder's output"),
        ("recurrent_gemma", "its logits are not its head on its decoder's output"),
        ("gptj", None),
    ],
)
def test_a_loss_that_holds_all_logits_is_the_way_where_hidden_states_are_not_enough(kind, reason):
    model = small(kind)
    token_losses, found = losses.fitting(model)
    assert found == reason
    tokens = torch.arange(2, 22)[None]
    places, labels = torch.arange(3, 19), torch.arange(4, 20)
    total, each = token_losses(model, {"input_ids": tokens}, places, labels)
    logits = model(input_ids=tokens, use_cache=False).logits[0, places]
    torch.testing.assert_close(each, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
