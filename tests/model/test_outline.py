"""What a model keeps in fp32 beside bf16 weights, by its class and by its files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from finetune.model import base
from finetune.model.base import outline

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def mixed(tiny_base, tmp_path):
    """The tiny base as many are on the Hub: in bf16, with a tensor in fp32 whose values bf16 has no place for."""
    directory = shutil.copytree(tiny_base, tmp_path / "mixed")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors[NORM] = torch.full_like(tensors[NORM], 1.001, dtype=torch.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return directory


def test_what_the_files_store_in_fp32_beside_bf16_stays_so_to_the_bit(mixed):
    model = base.load_as_stored(mixed, torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert [name for name, dtype in types.items() if dtype == torch.float32] == [NORM]
    assert torch.equal(model.state_dict()[NORM], load_file(mixed / "model.safetensors")[NORM])
    assert base.load_model(mixed, torch.bfloat16).state_dict()[NORM].dtype == torch.bfloat16


def test_a_base_whole_in_fp32_keeps_nothing(tiny_base):
    assert outline.stored_in_fp32(base.empty_model(tiny_base), tiny_base) == frozenset()


def test_what_transformers_keeps_is_found_without_a_weight():
    config = Ernie4_5_MoeConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config.moe_num_experts, config.moe_intermediate_size, config.moe_layer_start_index = 2, 8, 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    gate = "model.layers.1.mlp.gate"
    assert outline.kept(model) == {f"{gate}.weight", f"{gate}.moe_statics.e_score_correction_bias"}


def test_the_type_is_said_in_every_section_that_says_one():
    config = {"torch_dtype": "float16", "text_config": {"dtype": "float32", "n": 1}, "vision_config": {"depth": 2}}
    assert base.with_dtype(config, torch.bfloat16) == {
        "text_config": {"dtype": "bfloat16", "n": 1},
        "vision_config": {"depth": 2},
        "dtype": "bfloat16",
    }
