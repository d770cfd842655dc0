"""What the layers keep and how they are compiled changes memory and speed, and not what is computed."""

from itertools import product

import pytest
import torch

from finetune.errors import BaseError, FinetuneError
from finetune.model import decoder_layers
from finetune.model.adapters import apply
from finetune.model.attention import PER_ROW
from finetune.model.base import empty_model, load_model
from finetune.recipe.schema import LoraAdapter
from tests.lengths import length

BOUNDS = [[0, 9, 30], [0, 17], [0, 3, 5, 40]]


def model(base, has_adapter):
    torch.manual_seed(1)
    settings = LoraAdapter(name="lora", rank=4, dropout=0.2) if has_adapter else None
    return apply(load_model(base, attention=PER_ROW), settings).train()


def gradients(model, bounds, dtype=None):
    """Of one packed sequence, with the bytes that were kept for the backward pass."""
    kept = {}
    inputs = {
        "input_ids": torch.arange(2, 2 + bounds[-1])[None],
        "position_ids": torch.cat([torch.arange(end - start) for start, end in zip(bounds, bounds[1:], strict=False)])[
            None
        ],
        "row_bounds": bounds,
    }

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(2)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = model(**inputs, use_cache=False).logits.float().square().mean()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        size = sum(count for place, count in kept.items() if place not in weights)
        loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, size


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
def test_checkpointed_activations_give_the_same_gradients_to_the_bit_and_keep_less(tiny_base, has_adapter, dtype):
    plain, checkpointed = model(tiny_base, has_adapter), model(tiny_base, has_adapter)
    decoder_layers.checkpoint_activations(checkpointed)
    for bounds in BOUNDS:
        expected, all_kept = gradients(plain, bounds, dtype)
        found, kept = gradients(checkpointed, bounds, dtype)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert kept < 0.6 * all_kept


def test_activation_checkpointing_is_asked_for_by_either_of_its_names(tiny_base):
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        asked, base = [], load_model(tiny_base)
        base.activation_checkpointing_enable = None  # an instance's own hides its class's
        setattr(base, name, asked.append)
        decoder_layers.checkpoint_activations(base)
        assert asked == [{"use_reentrant": False}]


def test_a_base_that_cannot_be_checkpointed_is_named(tiny_base):
    base = load_model(tiny_base)
    base.supports_gradient_checkpointing = False
    with pytest.raises(BaseError, match="train.activation_checkpointing: LlamaForCausalLM does not support"):
        decoder_layers.checkpoint_activations(base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_adapter", "is_checkpointed"),
    length([(True, True)], list(product((False, True), repeat=2))),
    ids=lambda value: str(value).lower(),
)
def test_compiled_layers_give_the_same_gradients_to_float_tolerance(tiny_base, has_adapter, is_checkpointed):
    plain, compiled = model(tiny_base, has_adapter), model(tiny_base, has_adapter)
    if is_checkpointed:
        decoder_layers.checkpoint_activations(compiled)
    try:
        decoder_layers.compile_layers(compiled)
    except FinetuneError as error:
        pytest.skip(error.message)
    names = set(compiled.state_dict())
    for bounds in BOUNDS:
        expected, found = gradients(plain, bounds)[0], gradients(compiled, bounds)[0]
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert names == set(plain.state_dict())


def test_without_a_compiler_compiling_is_refused(tiny_base, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(FinetuneError, match="train.compile: there is no C\\+\\+ compiler\\nhint: install g\\+\\+"):
        decoder_layers.compile_layers(load_model(tiny_base))


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
def test_offloaded_activations_are_those_of_the_cpu_to_the_bit(tiny_base, has_adapter):
    plain, offloaded = model(tiny_base, has_adapter), model(tiny_base, has_adapter)
    decoder_layers.checkpoint_activations(plain)
    decoder_layers.checkpoint_activations(offloaded, is_offloaded=True)
    (expected, _), (found, _) = gradients(plain, BOUNDS[0]), gradients(offloaded, BOUNDS[0])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_transformers_is_asked_to_offload_where_the_model_is_not_on_the_host(tiny_base):
    for is_offloaded, expected in ((False, {}), (True, {"offload": True})):
        asked, base = [], empty_model(tiny_base)  # on the meta device
        base.activation_checkpointing_enable = lambda *_, asked=asked, **named: asked.append(named)
        decoder_layers.checkpoint_activations(base, is_offloaded)
        assert asked == [expected]
