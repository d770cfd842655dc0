"""LoRA as a GPU sums it equals the plain formula, rounds less than peft's own forward, and gives the same bits each time."""

import copy

import pytest
import torch

from finetune.model.adapters import apply, sum_as_a_gpu, weights
from finetune.model.adapters.in_product import Added
from finetune.model.base import load_model
from finetune.recipe.schema import LoraAdapter

PATH = "base_model.model.model.layers.1.mlp.up_proj"


def adapted(base, is_gpu=True, dtype=torch.float32, **settings):
    """The tiny model in a type, with matrices that do something."""
    torch.manual_seed(0)
    model = apply(load_model(base, dtype), LoraAdapter(name="lora", rank=4, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    if is_gpu:
        sum_as_a_gpu(model)
    return model.train()


def run(model, dtype=torch.float32, is_autocast=False, shape=(2, 7)):
    """Output, gradient of the input and of both matrices of one layer; the same numbers each time."""
    layer = model.get_submodule(PATH)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(*shape, layer.in_features, generator=generator).to(dtype).requires_grad_()
    seed = torch.randn(*shape, layer.out_features, generator=generator)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        output = layer(inputs)
    matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [output, *torch.autograd.grad(output, [inputs, *matrices], seed.to(output.dtype))]


def formula(model, shape=(2, 7)):
    """The same in fp64."""
    layer = model.get_submodule(PATH)
    weight, down, up = (
        each.weight.detach().double().requires_grad_()
        for each in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(*shape, layer.in_features, generator=generator)
    seed = torch.randn(*shape, layer.out_features, generator=generator)
    rounded = inputs.bfloat16().double().requires_grad_()
    output = rounded @ weight.T + layer.scaling["default"] * (rounded @ down.T @ up.T)
    return [output, *torch.autograd.grad(output, [rounded, down, up], seed.bfloat16().double())]


def off(ours, expected):
    return [((mine - other).norm() / other.norm()).item() for mine, other in zip(ours, expected, strict=True)]


@pytest.mark.parametrize("shape", [(2, 7), (7,), (1, 2, 3)])
def test_in_fp32_it_is_the_plain_formula(tiny_base, shape):
    ours, peft = run(adapted(tiny_base), shape=shape), run(adapted(tiny_base, is_gpu=False), shape=shape)
    assert ours[0].shape == (*shape, 64)
    for mine, other in zip(ours, peft, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_is_nearer_to_the_formula_than_the_three_roundings_of_peft(tiny_base):
    ours = adapted(tiny_base, dtype=torch.bfloat16)
    peft = adapted(tiny_base, is_gpu=False, dtype=torch.bfloat16)
    found = off(run(ours, torch.bfloat16, is_autocast=True), formula(ours))
    theirs = off(run(peft, torch.bfloat16, is_autocast=True), formula(peft))
    assert found[0] < theirs[0] < 0.01 and max(found) < 0.01, (found, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_dropout_it_gives_the_same_bits_each_time(tiny_base, dtype):
    model = adapted(tiny_base, dtype=dtype, dropout=0.5)
    one, two = (run(model, dtype, is_autocast=True) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))
    dropped = (run(adapted(tiny_base, dtype=dtype), dtype, is_autocast=True)[0] - one[0]).norm()
    assert dropped > 0.1 * one[0].norm()


def test_without_autocast_a_bf16_base_takes_fp32_matrices(tiny_base):
    ours, peft = (run(adapted(tiny_base, each, torch.bfloat16), torch.bfloat16)[0] for each in (True, False))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, peft)


def test_names_copies_and_a_disabled_adapter_are_as_with_peft(tiny_base):
    model, plain = adapted(tiny_base), load_model(tiny_base)
    assert weights(model).keys() == weights(adapted(tiny_base, is_gpu=False)).keys()
    tokens = torch.arange(10)[None]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        logits = model(tokens).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(tokens).logits, logits), "a copy runs its own matrices"
        with copied.disable_adapter():
            assert torch.equal(copied(tokens).logits, plain(tokens).logits)
        merged = copied.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("has_bias", [True, False])
def test_its_gradients_are_the_derivatives(has_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (5, 6), "weight": (4, 6), "down": (2, 6), "up": (4, 2)}
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("input", "down", "up"):
        given[name].requires_grad_()
    bias = torch.randn(4, generator=generator, dtype=torch.float64) if has_bias else None
    assert torch.autograd.gradcheck(Added.apply, (*given.values(), bias, 0.7))
