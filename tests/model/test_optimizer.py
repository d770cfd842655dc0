"""Optimizers get their settings from the recipe; the tables hold exactly the names that a recipe may use."""

import typing
from importlib.util import find_spec

import pytest
import torch

from finetune.errors import FinetuneError
from finetune.model.adapters import ADAPTERS
from finetune.model.base import load_model
from finetune.model.optimizer import OPTIMIZERS, build, rounded
from finetune.model.optimizer.rounded import RoundedAdamW, Scratch, round_by_chance
from finetune.plan.memory import update_slice
from finetune.plan.schedules import SCHEDULES
from finetune.recipe.schema import Optimizer, Recipe, optimizers
from finetune.tasks import TASKS

NEEDS_BITSANDBYTES = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
SLICE = update_slice("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BUILDABLE = [
    "adamw",
    "sgd",
    pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES),
    pytest.param("paged_adamw_8bit", marks=[NEEDS_BITSANDBYTES, NEEDS_GPU]),
]


def literals(annotation):
    """Every string of the literals in an annotation, and of the `name` of every section in it."""
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    if hasattr(annotation, "model_fields"):
        return literals(annotation.model_fields["name"].annotation)
    return set().union(*(literals(part) for part in typing.get_args(annotation)))


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (OPTIMIZERS, Optimizer.model_fields["name"]),
        (optimizers.OPTIMIZERS, Optimizer.model_fields["name"]),
        (SCHEDULES, Optimizer.model_fields["schedule"]),
        (optimizers.SCHEDULES, Optimizer.model_fields["schedule"]),
        (ADAPTERS, Recipe.model_fields["adapter"]),
        (TASKS, Recipe.model_fields["task"]),
    ],
)
def test_a_table_has_the_names_that_the_schema_allows(table, field):
    assert set(table) == literals(field.annotation)


def settings(name, **others):
    return Optimizer(name=name, learning_rate=0.1, **others)


def built(weights, settings, seed=0):
    """The optimizer of bare weights."""
    return build(torch.nn.ParameterList(weights), settings, seed)


def test_every_optimizer_is_built_by_a_test():
    assert {getattr(each, "values", (each,))[0] for each in BUILDABLE} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", BUILDABLE)
def test_weight_decay_is_for_matrices_and_not_for_biases_and_norms(tiny_base, name):
    model = load_model(tiny_base)
    matrices, others = build(model, settings(name, weight_decay=0.3), 0).param_groups
    assert matrices["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in others["params"]} == {
        name for name in names.values() if "norm" in name
    }
    assert {id(parameter) for group in (matrices, others) for parameter in group["params"]} == names.keys()


def test_frozen_parameters_are_not_in_the_optimizer_and_an_empty_group_is_not_made():
    trained, frozen = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3)
    frozen.requires_grad_(False)
    [group] = build(torch.nn.Sequential(trained, frozen), settings("adamw"), 0).param_groups
    assert len(group["params"]) == 1 and group["params"][0] is trained.weight


def test_adamw_and_sgd_have_the_settings_of_the_recipe():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    [adamw] = built([weight], settings("adamw", betas=(0.8, 0.9), eps=1e-6)).param_groups
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.9), 1e-6)
    [sgd] = built([weight], settings("sgd", momentum=0.7)).param_groups
    assert sgd["momentum"] == 0.7


@pytest.mark.parametrize("name", BUILDABLE)
def test_without_a_learning_rate_of_the_step_nothing_moves(name):
    """`loop` writes the learning rate before every update; a forgotten one shows at once."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = built([weight], settings(name))
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("name", BUILDABLE)
def test_weight_decay_is_decoupled_from_the_gradient(name):
    """A weight without gradient shrinks by learning rate times decay (under `sgd` as long as it has no momentum)."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = built([weight], settings(name, weight_decay=0.5))
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))


@NEEDS_BITSANDBYTES
def test_moments_of_large_matrices_take_8_bits_and_those_of_embeddings_and_small_tensors_do_not():
    model = torch.nn.Sequential(torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128))
    optimizer = build(model, settings("adamw_8bit"), 0)
    model(torch.arange(128)).sum().backward()
    optimizer.step()
    dtypes = {name: optimizer.state[parameter]["exp_avg"].dtype for name, parameter in model.named_parameters()}
    assert dtypes == {"0.weight": torch.float32, "1.weight": torch.uint8, "1.bias": torch.float32}
    assert optimizer.state[model[1].weight]["exp_avg_scale"].shape == (128 * 64 // 256,)


@NEEDS_BITSANDBYTES
def test_8_bits_follow_adamw_and_restored_state_goes_on_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)
    grads = torch.randn(8, 64, 128, generator=generator) + 1.0
    plain, coded, resumed = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [built([plain], settings("adamw")), built([coded], settings("adamw_8bit"))]
    for number, grad in enumerate(grads):
        if number == 4:
            later = built([resumed], settings("adamw_8bit"))
            resumed.data.copy_(coded.data)
            later.state[resumed] = {name: value.clone() for name, value in optimizers[1].state[coded].items()}
            optimizers.append(later)
        for optimizer, weight in zip(optimizers, (plain, coded, resumed), strict=False):
            optimizer.param_groups[0]["lr"] = 0.01
            weight.grad = grad.clone()
            optimizer.step()
    assert torch.equal(coded, resumed)
    moved = (plain - start).norm()
    assert (coded - plain).norm() < 0.05 * moved and not torch.equal(coded, plain)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bits_without_bitsandbytes_are_refused_with_what_to_install(name):
    with pytest.raises(FinetuneError, match="optimizer.name: 8-bit optimizers need bitsandbytes\nhint: pip install"):
        built([torch.nn.Parameter(torch.ones(2, 2))], settings(name))


@NEEDS_BITSANDBYTES
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_paging_without_a_gpu_is_refused():
    with pytest.raises(FinetuneError, match="optimizer.name: `paged_adamw_8bit` needs a GPU"):
        built([torch.nn.Parameter(torch.ones(2, 2))], settings("paged_adamw_8bit"))


def test_rounding_by_chance_gives_a_neighbour_in_bf16_and_is_right_on_average():
    generator, scratch = torch.Generator().manual_seed(0), Scratch(torch.device("cpu"), SLICE)
    for value in (1.0 + 2**-9, -3.3, 1e-3, -7e-20):
        values = torch.full((SLICE,), value)
        round_by_chance(values, generator, scratch)
        assert torch.equal(values, values.bfloat16().float())
        low, high = values.min().item(), values.max().item()
        assert low < torch.tensor(value).item() < high and len(values.unique()) == 2
        assert values.double().mean().item() == pytest.approx(value, abs=(high - low) * 0.003)
    exact = torch.tensor([0.0, 1.0, -2.5])
    round_by_chance(exact, generator, scratch)
    assert exact.tolist() == [0.0, 1.0, -2.5]


def test_weights_in_bf16_have_fp32_moments_and_take_in_updates_that_rounding_to_nearest_would_lose():
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = built([weight], settings("adamw"))
    assert isinstance(optimizer, RoundedAdamW)
    optimizer.param_groups[0]["lr"] = 1e-4  # of a weight of 1, rounding to nearest loses all under 0.002
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    slots = optimizer.state[weight]
    assert slots["exp_avg"].dtype == slots["exp_avg_sq"].dtype == torch.float32 and slots["step"] == 100
    assert weight.float().mean().item() == pytest.approx(0.99, abs=5e-4)


def test_updates_of_fp32_weights_are_those_of_adamw_to_the_bit_whatever_the_size():
    start = torch.randn(SLICE + 1000, 1)
    plain, sliced = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    adamw = built([plain], settings("adamw", weight_decay=0.1))
    groups = [{"params": [sliced], "weight_decay": 0.1}]
    rounded = RoundedAdamW(groups, 0, betas=(0.9, 0.999), eps=1e-8)
    for optimizer, weight in ((adamw, plain), (rounded, sliced)):
        optimizer.param_groups[0]["lr"], optimizer.grad_scale = 0.01, torch.tensor(2.0)
        for number in (1, 2, 3):
            weight.grad = start.cos() * number
            optimizer.step()
    assert torch.equal(plain, sliced)


def test_scratch_is_as_large_as_a_slice_or_as_the_largest_weight(monkeypatch):
    assert (update_slice("cpu"), update_slice("cuda")) == (2**20, 2**26)
    for slice_, expected in ((2**26, 640), (100, 100)):
        monkeypatch.setattr(rounded, "update_slice", lambda kind, size=slice_: size)
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in (10, (10, 64), 33)]
        optimizer = built(weights, settings("adamw"))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = 0.1
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        [scratch] = optimizer._scratch.values()
        assert len(scratch.weight) == len(scratch.noise) == expected
        assert all((weight < 1).all() for weight in weights)


def test_chance_depends_on_seed_and_update_and_not_on_what_else_is_drawn():
    def trained(seed):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = built([weight], settings("adamw"), seed)
        optimizer.param_groups[0]["lr"] = 1e-3
        weights = []
        for _ in range(3):
            torch.rand(1)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            weights.append(weight.detach().clone())
        return weights

    first, again, other = trained(0), trained(0), trained(1)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[-1], other[-1])
    assert not torch.equal(first[0] != 1, first[1] != first[0])
