"""On a GPU a model is made where it trains, each weight in the type in which it stays. Shown on the meta device, and bits on a CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from finetune.compare.generation import answerer
from finetune.errors import BaseError
from finetune.model import adapters
from finetune.model.base import Place, empty_model, load_model
from finetune.recipe.load import load
from finetune.recipe.schema import LoraAdapter
from finetune.training import build as build_module
from finetune.training.build import trained_model
from finetune.training.opened import open_model
from finetune.training.resolve import resolve

META = torch.device("meta")


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory, tiny_base):
    """Its head is a linear layer with weights of its own, and one of its linear layers has a bias."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("untied")
    config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False, mlp_bias=True)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["tiny_base", "untied_base"])
def test_weights_that_are_read_as_bf16_are_those_that_are_cast_to_it(name, request, monkeypatch):
    path = request.getfixturevalue(name)
    outline, set_aside = empty_model(path), []
    count = modeling_utils.get_total_byte_count
    # what a GPU would be asked for before weights are read
    monkeypatch.setattr(modeling_utils, "is_accelerator_device", lambda device: True)
    monkeypatch.setattr(modeling_utils, "get_total_byte_count", lambda *of: set_aside.append(count(*of)) or {})
    with Place(torch.device("cpu"), adapters.linear_weights(outline)).reading(type(outline)):
        read = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu").state_dict()
    cast = adapters.apply(load_model(path), LoraAdapter(name="lora", rank=2, targets=["q_proj"]))
    adapters.store_frozen_as_bf16(cast)
    expected = cast.unload().state_dict()
    assert read.keys() == expected.keys()
    assert {name: each.dtype for name, each in read.items()} == {name: each.dtype for name, each in expected.items()}
    assert all(torch.equal(read[name], expected[name]) for name in read)
    assert len({each.dtype for each in read.values()}) == 2
    kept = {each.data_ptr(): each.nbytes for each in read.values()}
    assert sum(set_aside[0].values()) == pytest.approx(sum(kept.values()), abs=64)  # rotary frequencies
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # nothing stays behind
    assert {each.dtype for each in again.state_dict().values()} == {torch.float32}


def test_an_adapter_beside_bf16_weights_begins_with_the_bits_that_it_has_beside_fp32(untied_base):
    settings, outline = LoraAdapter(name="lora", rank=2), empty_model(untied_base)
    place = Place(torch.device("cpu"), adapters.linear_weights(outline))
    with place.reading(type(outline)):
        read = AutoModelForCausalLM.from_pretrained(untied_base, dtype=torch.float32)
    before = {name: each.clone() for name, each in read.state_dict().items()}
    models = []
    for model, names in ((load_model(untied_base), ()), (read, place.names)):
        torch.manual_seed(3)
        with adapters.taken_for_fp32(model, names):
            models.append(adapters.apply(model, settings))
    expected, found = (adapters.weights(model) for model in models)
    assert expected.keys() == found.keys() and any(each.abs().max() > 0 for each in found.values())
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    after = models[1].unload().state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_stored_in_half_precision_are_never_made_fp32_on_a_cpu(
    untied_base, tiny_base, tiny_tokenizer, recipe_file, tmp_path, monkeypatch, stored
):
    """A whole base in fp32 takes twice the memory of the training."""
    AutoModelForCausalLM.from_pretrained(untied_base, dtype=stored).save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    recipe = recipe_file(base={"checkpoint": str(tmp_path)}, train={"steps": 1, "batch_size": 6, "precision": "bf16"})
    resolved = resolve(load(recipe))
    made = trained_model(resolved.plan, resolved.base_directory, torch.device("cpu"))
    linear = [name for name in adapters.linear_weights(empty_model(tmp_path)) if "q_proj" not in name]
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): each
        for name, each in made.state_dict().items()
    }
    types = {found[name].dtype for name in linear}
    assert types == {torch.float32 if stored == torch.float32 else torch.bfloat16}
    adapters.store_frozen_as_bf16(made)
    monkeypatch.setattr(build_module, "_place", lambda recipe, directory, device, kind: Place(device))
    other = trained_model(resolved.plan, resolved.base_directory, torch.device("cpu"))
    adapters.store_frozen_as_bf16(other)
    expected = other.state_dict()
    assert all(
        torch.equal(each, expected[name]) and each.dtype == expected[name].dtype
        for name, each in made.state_dict().items()
    )


def test_generate_opens_a_model_in_bf16_on_a_gpu_and_as_it_was_on_a_cpu(tiny_base, monkeypatch):
    asked = []

    def opened(text, **settings):
        asked.append(settings)
        raise BaseError("enough")

    monkeypatch.setattr(answerer, "open_model", opened)
    for device in (META, None):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=device, **_: found)
        with pytest.raises(BaseError):
            answerer.open_answerer(str(tiny_base))
    assert asked == [{"device": META, "dtype": torch.bfloat16}, {"device": torch.device("cpu"), "dtype": None}]
    model = open_model(str(tiny_base), **asked[0]).model
    assert {(each.device, each.dtype) for each in model.parameters()} == {(META, torch.bfloat16)}


@pytest.mark.parametrize(
    ("sections", "types"),
    [
        ({}, {torch.bfloat16, torch.float32}),
        ({"adapter": None}, {torch.float32}),
        ({"train": {"steps": 1, "precision": "fp32"}}, {torch.float32}),
    ],
    ids=["adapter", "full", "fp32"],
)
def test_a_model_is_made_on_its_device_in_the_types_it_is_trained_with(recipe_file, sections, types):
    resolved = resolve(load(recipe_file(**{"train": {"steps": 1}} | sections)))
    model = trained_model(resolved.plan, resolved.base_directory, META)
    assert {parameter.device for parameter in model.parameters()} == {META}
    assert {parameter.dtype for parameter in model.parameters()} == types
    if len(types) == 2:
        small = {name for name, each in model.named_parameters() if each.dtype == torch.float32}
        assert all("norm" in name or "embed" in name or "lora_" in name for name in small)
