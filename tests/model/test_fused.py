"""Modules that kernels stand for are found by what they compute; kernels compute it, forward and backward, and twice the same bits.

The real kernels run where TRITON_INTERPRET=1 is set and the extra `kernels` is installed.
"""

import pytest
import torch
from transformers import AutoConfig

from finetune.model import fused, tiny
from finetune.model.fused import formulas, liger
from finetune.model.fused.formulas import Gated, Norm
from tests import interpreted

LLAMA, GEMMA = Norm(0.0, "llama", "variance_epsilon"), Norm(1.0, "gemma", "eps")
OF_THREE = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": ([LLAMA], [Gated("silu", *OF_THREE)], True),
    "gemma3_text": ([GEMMA], [Gated("gelu_tanh", *OF_THREE)], True),
    "phi3": ([LLAMA], [Gated("silu", "gate_up_proj", "gate_up_proj", "down_proj")], True),
    "olmo2": ([Norm(0.0, "gemma", "variance_epsilon")], [Gated("silu", *OF_THREE)], True),
    "glm4": ([LLAMA], [Gated("silu", "gate_up_proj", "gate_up_proj", "down_proj")], False),  # pairs of neighbors turn
    "cohere": ([], [Gated("silu", *OF_THREE)], False),  # norms with a mean
    "gpt_oss": ([Norm(0.0, "gemma", "variance_epsilon")], [], False),
    "gpt2": ([], [], False),
}


def small(family):
    return tiny.model_like(AutoConfig.for_model(family), 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_by_what_they_compute(family):
    norms, gated, is_turned = FAMILIES[family]
    found = fused.parts_of(small(family))
    assert (list(found.norms.values()), list(found.gated.values())) == (norms, gated)
    assert bool(found.rotary) == is_turned


def test_a_class_whose_modules_differ_is_left_alone():
    model = small("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.GELU(approximate="tanh")
    model.model.norm.extra = torch.nn.Parameter(torch.ones(1))
    found = fused.parts_of(model)
    assert not found.norms and not found.gated and found.rotary


def test_a_module_with_dropout_or_another_input_is_left_alone():
    model = small("llama")
    narrow = model.model.layers[0].mlp.down_proj
    narrow.register_forward_hook(lambda *given: torch.nn.functional.dropout(given[2], 0.1, narrow.training))
    norm = model.model.norm
    norm.forward = lambda hidden, gate=None: type(norm).forward(norm, hidden)
    found = fused.parts_of(model)
    assert not found.norms and not found.gated and found.rotary


def test_weights_and_their_names_stay_and_other_models_of_a_class_keep_their_code():
    model, other = small("llama"), small("llama")
    names, forward = list(model.state_dict()), type(model.model.layers[0].self_attn).forward
    switch = fused.apply(model, fused.parts_of(other))
    assert list(model.state_dict()) == names and fused.switch_of(model) is switch and fused.switch_of(other) is None
    assert type(model.model.layers[0].self_attn).forward is forward
    assert all("forward" not in vars(module) for module in other.modules())
    switch.is_on = False
    row = torch.arange(2, 12)[None]
    assert torch.equal(model(input_ids=row).logits, other(input_ids=row).logits) and not switch.calls


@pytest.fixture
def kernels():
    interpreted.prepare()


def gradients(function, *inputs, seed):
    return torch.autograd.grad(function(*inputs), inputs, seed)


def distance(one, two):
    return float((one.float() - two.float()).norm() / two.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("found", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_a_norm_is_that_of_its_formula_and_twice_the_same_bits(kernels, found, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, 3, 33), (33,))]
    exact = [each.detach().double().float().requires_grad_() for each in inputs]
    seed = torch.randn(2, 3, 33).to(dtype)
    kept = seed.clone()

    def ours(hidden, weight):
        return liger.norm(hidden, weight, found, 1e-6)

    def plain(hidden, weight):
        return formulas.norm(hidden, weight, found, 1e-6)

    made, again = (gradients(ours, *inputs, seed=seed) for _ in range(2))
    assert all(map(torch.equal, made, again)) and torch.equal(seed, kept)  # a residual stream needs the gradient, too
    expected = gradients(plain, *exact, seed=seed.float())
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    assert distance(ours(*inputs), plain(*exact)) < limit
    assert all(distance(*pair) < limit for pair in zip(made, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_is_that_of_its_formula_and_twice_the_same_bits(kernels, activation, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 40).to(dtype).requires_grad_() for _ in range(2)]
    exact, seed = [each.detach().float().requires_grad_() for each in inputs], torch.randn(2, 3, 40).to(dtype)

    def ours(gate, up):
        return liger.gated(gate * 1, up * 1, activation)  # its backward pass writes over what it was given

    made, again = (gradients(ours, *inputs, seed=seed) for _ in range(2))
    assert all(map(torch.equal, made, again))
    expected = gradients(lambda gate, up: formulas.gated(gate, up, activation), *exact, seed=seed.float())
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    assert all(distance(*pair) < limit for pair in zip(made, expected, strict=True))


@pytest.mark.parametrize("size", [8, 4], ids=["whole", "partial"])
def test_positions_turn_heads_as_the_formula_has_it(kernels, size):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2)]
    angles = torch.randn(1, 5, size // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    seeds = [torch.randn(each.shape) for each in inputs]
    made = torch.autograd.grad(
        liger.rotated(*(each * 1 for each in inputs), cos, sin), inputs, [each.clone() for each in seeds]
    )
    expected = torch.autograd.grad([formulas.rotated(each, cos, sin) for each in inputs], inputs, seeds)
    assert all(distance(*pair) < 1e-6 for pair in zip(made, expected, strict=True))


def test_an_error_of_triton_is_one_that_the_boundary_around_libraries_knows():
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources

    with pytest.raises(RuntimeError, match="OutOfResources: out of resource: shared memory"), liger.told_as_usual():
        raise OutOfResources(2, 1, "shared memory")
    with pytest.raises(ZeroDivisionError), liger.told_as_usual():
        1 / 0  # noqa: B018
