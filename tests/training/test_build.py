"""The model of which each rank reads its own rows begins with the bits of one that is loaded whole, its adapter too."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.model import adapters
from finetune.recipe.load import load
from finetune.training.build import trained_model, unread_model
from finetune.training.resolve import resolve

CPU = torch.device("cpu")
ADAPTERS = {
    "lora": {"name": "lora", "rank": 2, "alpha": 4},
    "full": None,
    "frozen": {"name": "frozen", "freeze": ["model.layers.0.*"]},
}


@pytest.fixture(scope="module")
def experts(tiny_base, tiny_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts")
    changed = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "head_dim": 8}
    config = AutoConfig.from_pretrained(tiny_base).to_dict() | changed | {"model_type": "qwen3_moe"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", ["tiny_base", "experts"])
def test_what_is_read_later_begins_with_the_bits_of_what_is_loaded_at_once(
    base, adapter, weights, recipe_file, request
):
    recipe = recipe_file(
        base={"checkpoint": str(request.getfixturevalue(base))},
        adapter=ADAPTERS[adapter],
        train={"steps": 1, "batch_size": 6, "precision": "bf16", "weights": weights},
    )
    resolved = resolve(load(recipe))
    expected = trained_model(resolved.plan, resolved.base_directory, CPU)
    if adapter == "lora":
        adapters.store_frozen_as_bf16(expected)
    model, unread = unread_model(resolved.plan, resolved.base_directory, CPU)
    unread.fill(model)
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    facts = [{name: (each.dtype, each.requires_grad) for name, each in of.items()} for of in (found, wanted)]
    assert facts[0] == facts[1]
    assert all(torch.equal(each, wanted[name]) for name, each in found.items())
    assert adapter != "lora" or any(each.abs().max() > 0 for name, each in found.items() if ".lora_A." in name)
