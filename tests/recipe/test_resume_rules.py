"""Every key of a recipe has one rule for a resume, and the documentation shows the rules that the code decides by."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from finetune.recipe.load import load
from finetune.recipe.resume_rules import FACT_NAMES, FACTS, RECIPE, binding, differences, outcome, rule_of
from finetune.recipe.schema import Recipe, Section

PAGE = Path(__file__).parents[2] / "docs/resume.md"


def keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe that holds a value or a list, dotted; those in a list as of its first item."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inside = list(sections(field.annotation))
        if not inside:
            yield key
        for section, is_listed in inside:
            yield from keys(section, f"{key}[0]." if is_listed else f"{key}.")


def sections(annotation: object, is_listed: bool = False) -> Iterator[tuple[type[Section], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, is_listed
    for argument in get_args(annotation):
        yield from sections(argument, is_listed or getattr(annotation, "__origin__", None) is list)


def uncovered(model: type[Section]) -> list[str]:
    return [key for key in keys(model) if sum(rule.covers(key) for rule in RECIPE) != 1]


def test_every_recipe_key_has_exactly_one_rule():
    found = set(keys(Recipe))
    assert {"data.train[0].path", "adapter.rank", "checkpoint.keep.last", "train.seed", "publish.repo"} <= found
    assert uncovered(Recipe) == []


def test_a_key_that_is_added_without_a_rule_is_found():
    class Shelf(Section):
        width: int = 0

    class Added(Recipe):
        shelf: Shelf = Shelf()
        height: int = 0

    assert uncovered(Added) == ["shelf.width", "height"]


def test_no_rule_names_a_key_that_is_not_there():
    sections_and_keys = {
        ".".join(key.split(".")[:depth]).removesuffix("[0]") for key in keys(Recipe) for depth in range(1, 9)
    }
    assert {name for rule in RECIPE for name in rule.keys} <= sections_and_keys


def test_the_page_shows_the_rules_that_the_code_decides_by():
    rows = [
        f"| {', '.join(f'`{key}`' for key in rule.keys)} | {rule.on_resume} | {rule.why} |"
        for rule in (*RECIPE, *FACTS)
    ]
    section = PAGE.read_text().partition("## What may change on resume\n")[2].partition("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| `")]
    assert "\n".join(shown) == "\n".join(rows)


def test_every_rule_is_one_of_four():
    assert {rule.on_resume for rule in RECIPE} == {"taken", "extended", "refused"}
    assert {rule.on_resume for rule in FACTS} == {"said"} and len(set(FACT_NAMES)) == len(FACT_NAMES)


def test_a_rule_covers_a_section_and_what_is_in_it_and_no_key_that_only_begins_alike():
    for key in ("data", "data.holdout", "data.train[0].path", "data[0]"):
        assert rule_of(key) == rule_of("data")
    assert not rule_of("train.steps").covers("train.steps_of_another_kind")


@pytest.mark.parametrize(
    ("key", "old", "new", "expected"),
    [
        ("train.steps", 10, 20, "extended"),
        ("train.epochs", 1, 2, "extended"),
        ("train.steps", 20, 10, "refused"),
        ("train.steps", None, 10, "refused"),
        ("train.epochs", 1, None, "refused"),
        ("train.micro_batch_tokens", "auto", 128, "taken"),
        ("train.micro_batch_tokens", 256, 128, "taken"),
        ("train.activation_checkpointing", False, True, "taken"),
        ("train.weights", "fp32", "bf16", "refused"),
        ("train.batch_size", 8, 16, "refused"),
        ("publish", None, {"repo": "owner/name"}, "taken"),
        ("adapter", {"name": "lora"}, None, "refused"),
        ("data.train[0].path", "a", "b", "refused"),
    ],
)
def test_a_difference_has_an_outcome(key, old, new, expected):
    assert outcome(key, old, new) == expected


def test_every_difference_of_two_recipes_is_named(recipe_file):
    old = load(recipe_file()).recipe.model_dump(mode="json")
    changed = ["optimizer.learning_rate=0.02", "train.seed=3", "guard.spike=stop", "data.holdout=3"]
    new = load(recipe_file(), changed).recipe.model_dump(mode="json")
    assert list(differences(old, old)) == []
    assert [(key, before, after) for key, before, after in differences(old, new) if key != "data.holdout"] == [
        ("guard.spike", "warn", "stop"),
        ("optimizer.learning_rate", 0.01, 0.02),
        ("train.seed", 0, 3),
    ]
    assert [key for key, _, _ in differences(old, new)][0] == "data.holdout"
    assert list(differences([1, {"a": 1}], [1, {"a": 2, "b": 3}])) == [("[1].a", 1, 2), ("[1].b", None, 3)]


def test_a_run_is_bound_to_all_keys_but_those_that_are_taken(recipe_file):
    recipe = load(recipe_file(publish={"repo": "owner/name"})).recipe.model_dump(mode="json")
    bound = binding(recipe)
    assert bound.keys() == {"base", "task", "data", "adapter", "optimizer", "train"}
    assert recipe["train"].keys() - bound["train"].keys() == {
        "micro_batch_tokens",
        "activation_checkpointing",
        "activation_offload",
        "early_stopping",
        "lost_rank_seconds",
        "mlp_chunk_tokens",
        "strategy",
        "compile",
        "kernels",
    }
    assert all(bound[name] == recipe[name] for name in bound if name != "train")
