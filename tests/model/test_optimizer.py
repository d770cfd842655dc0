"""Optimizers get their settings from the recipe; the tables hold exactly the names that a recipe may use."""

import typing

import pytest
import torch

from finetune.estimate import MOMENTS
from finetune.model.adapter import ADAPTERS
from finetune.model.base import load_model
from finetune.model.optimizer import OPTIMIZERS, build
from finetune.recipe.schema import Optimizer, Recipe
from finetune.schedule import SCHEDULES
from finetune.tasks import TASKS


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
        (SCHEDULES, Optimizer.model_fields["schedule"]),
        (ADAPTERS, Recipe.model_fields["adapter"]),
        (TASKS, Recipe.model_fields["task"]),
    ],
)
def test_a_table_has_the_names_that_the_schema_allows(table, field):
    assert set(table) == literals(field.annotation)


def test_the_memory_forecast_knows_every_optimizer():
    assert set(MOMENTS) == set(OPTIMIZERS)


def settings(name, **others):
    return Optimizer(name=name, learning_rate=0.1, **others)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_for_matrices_and_not_for_biases_and_norms(tiny_base, name):
    model = load_model(tiny_base)
    matrices, others = build(model.parameters(), settings(name, weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in others["params"]} == {
        name for name in names.values() if "norm" in name
    }
    assert {id(parameter) for group in (matrices, others) for parameter in group["params"]} == names.keys()


def test_frozen_parameters_are_not_in_the_optimizer_and_an_empty_group_is_not_made():
    trained, frozen = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3)
    frozen.requires_grad_(False)
    [group] = build([*trained.parameters(), *frozen.parameters()], settings("adamw")).param_groups
    assert len(group["params"]) == 1 and group["params"][0] is trained.weight


def test_adamw_and_sgd_have_the_settings_of_the_recipe():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    [adamw] = build([weight], settings("adamw", betas=(0.8, 0.9), eps=1e-6)).param_groups
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.9), 1e-6)
    [sgd] = build([weight], settings("sgd", momentum=0.7)).param_groups
    assert sgd["momentum"] == 0.7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_learning_rate_of_the_step_nothing_moves(name):
    """`loop` writes the learning rate before every update; a forgotten one shows at once."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build([weight], settings(name))
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled_from_the_gradient(name):
    """A weight without gradient shrinks by learning rate times decay (under `sgd` as long as it has no momentum)."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build([weight], settings(name, weight_decay=0.5))
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))
