"""A row has the rotary frequencies that it has alone in plain transformers, whatever it is packed with and whatever came before."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.model import attention, decoder_layers, rotary
from finetune.model.base import rope
from finetune.recipe.schema import Rope

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LENGTHS = (40, 8, 16, 24)  # on both sides of the original context, and at its end
ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], **ORIGINAL}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", **ORIGINAL},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "longrope": LONGROPE,
}


def model_of(kind, scaling, **options):
    """The same weights each time; each call makes a fresh model, because `dynamic` remembers what it has seen."""
    entry = {"rope_theta": 1e4, **SCALINGS[scaling]}
    settings = dict(SIZES)
    if scaling == "dynamic":
        settings["max_position_embeddings"] = 16
    if kind == "gemma3_text":
        settings |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        entry = {"full_attention": entry, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    if kind == "deepseek_v3":
        settings |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        settings |= {"first_k_dense_replace": 2, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, rope_parameters=entry, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, **options).eval()


def rows():
    tokens = 3 + torch.arange(sum(LENGTHS)) * 2_654_435_761 % 300
    return [row[None] for row in tokens.split(LENGTHS)]


def alone(kind, scaling):
    return torch.cat([model_of(kind, scaling)(input_ids=row, use_cache=False).logits for row in rows()], dim=1)


def packed(model):
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs = {"input_ids": torch.cat(rows(), dim=1), "position_ids": positions, "row_bounds": bounds}
    return model(**inputs, cu_seq_lens=torch.tensor(bounds, dtype=torch.int32), use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        *(("llama", scaling) for scaling in SCALINGS),
        ("phi3", "longrope"),
        ("gemma3_text", "dynamic"),
        ("gemma3_text", "longrope"),
        ("gemma3_text", "yarn"),
        ("deepseek_v3", "yarn"),
    ],
)
def test_packed_rows_are_what_each_is_alone_in_plain_transformers(kind, scaling):
    with torch.no_grad():
        expected = alone(kind, scaling)
        model = rotary.separate(model_of(kind, scaling, attn_implementation=attention.PER_ROW))
        found, again = packed(model), packed(model)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(found, again)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_without_it_packed_rows_would_have_the_frequencies_of_the_longest(scaling):
    with torch.no_grad():
        expected = alone("llama", scaling)
        found = packed(model_of("llama", scaling, attn_implementation=attention.PER_ROW))
    assert (found - expected).abs().max() > 1e-3


def test_a_row_alone_does_not_depend_on_the_row_before_it():
    with torch.no_grad():
        expected = alone("llama", "dynamic").split(LENGTHS, dim=1)
        model = rotary.separate(model_of("llama", "dynamic"))
        for row, logits in [*zip(rows(), expected, strict=True)][::-1] * 2:
            assert torch.equal(model(input_ids=row, use_cache=False).logits, logits)


def test_a_gradient_is_that_of_the_rows_alone():
    model = rotary.separate(model_of("llama", "dynamic", attn_implementation=attention.PER_ROW))
    decoder_layers.checkpoint_activations(model)
    packed(model.train()).square().sum().backward()
    expected = {}
    for row in rows():
        single = model_of("llama", "dynamic")
        single(input_ids=row, use_cache=False).logits.square().sum().backward()
        for name, each in single.named_parameters():
            expected[name] = expected.get(name, 0) + each.grad
    for name, each in model.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_what_generates_with_a_cache_is_as_in_transformers():
    row = rows()[0][:, :20]
    ours = rotary.separate(model_of("llama", "longrope")).generate(row, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, model_of("llama", "longrope").generate(row, max_new_tokens=8, do_sample=False))


def test_a_config_with_its_text_in_no_section_keeps_the_rest_of_the_text():
    """As Qwen2.5-VL is published: a section for the images, and the text beside it."""
    raw = {"model_type": "qwen2_5_vl", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}
    raw |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 128}
    raw |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "vision_config": {}}
    config = AutoConfig.for_model(**raw)
    scaled = rope.scaled_config(raw, config, Rope(rope_type="yarn", factor=4.0), "base")
    text = AutoConfig.for_model(**scaled).get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (64, 3, 300)
    assert text.max_position_embeddings == 512
    assert text.rope_parameters["rope_type"] == "yarn" and text.rope_parameters["mrope_section"] == [1, 1, 2]
