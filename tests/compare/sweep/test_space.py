"""What a sweep tries: read from `--set`, and made into trials that never change."""

import pytest

from finetune.compare.sweep import space
from finetune.compare.sweep.space import Range, Values
from finetune.recipe.yaml_nodes import parse, plain


def space_of(*overrides: str) -> dict:
    found, problems = space.space_of(overrides)
    assert not problems
    return found


def test_a_list_has_the_values_to_try_and_a_single_value_is_an_override() -> None:
    found = space_of("optimizer.learning_rate=[1e-4, 2e-4]", "train.seed=3", "optimizer.betas=[[0.9, 0.95]]")
    assert found == {
        "optimizer.learning_rate": Values((1e-4, 2e-4)),
        "train.seed": Values((3,)),
        "optimizer.betas": Values(([0.9, 0.95],)),
    }
    assert space.size(found) == 2


def test_a_grid_has_every_combination_and_the_last_key_changes_fastest() -> None:
    found = space.grid(space_of("a=[1, 2]", "b=[x, null]"))
    assert found == [{"a": 1, "b": "x"}, {"a": 1, "b": None}, {"a": 2, "b": "x"}, {"a": 2, "b": None}]


def test_ranges_are_read_and_drawn_within_their_ends() -> None:
    found = space_of("rate=log(1e-5,1e-3)", "drop=uniform( 0, 0.1 )", "rank=int(4, 6)", "name=[a, b]")
    assert found["rate"] == Range("log", 1e-5, 1e-3)
    drawn = space.random(found, 200, seed=0)
    assert len(drawn) == 200
    assert {each["rank"] for each in drawn} == {4, 5, 6}
    assert {each["name"] for each in drawn} == {"a", "b"}
    assert all(1e-5 <= each["rate"] <= 1e-3 and 0 <= each["drop"] <= 0.1 for each in drawn)
    assert 70 < sum(each["rate"] < 1e-4 for each in drawn) < 130  # half of them, by the logarithm


def test_a_random_search_is_decided_by_its_seed_and_more_trials_begin_with_the_same() -> None:
    found = space_of("rate=log(1e-5,1e-3)", "rank=[4, 8]")
    assert space.random(found, 8, seed=1)[:3] == space.random(found, 3, seed=1)
    assert space.random(found, 3, seed=1) != space.random(found, 3, seed=2)
    lists = space_of("rank=[4, 8, 16]", "alpha=[8, 16]")
    assert len({str(each) for each in space.random(lists, 6, seed=0)}) == 6
    assert len(space.random(space_of("rank=int(1, 3)"), 5, seed=0)) == 3


def test_arguments_are_read_back_as_the_same_values() -> None:
    settings = {"a": 1e-05, "b": True, "c": None, "d": "100 steps", "e": ["x", {"y": "1"}], "f": "true", "g": "é\n"}
    for argument in space.arguments(settings):
        key, _, text = argument.partition("=")
        root = parse(text, "--set", key).root
        assert plain(root, {}) == settings[key]


def test_a_space_is_read_back_from_its_record() -> None:
    found = space_of("rate=log(1e-5,1e-3)", "rank=int(4,64)", "name=[a, 1, null]")
    assert {key: space.axis_of(axis.record) for key, axis in found.items()} == found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate=log(0,1)", "`log(0,1)` has no logarithm at its low end: it must be above 0"),
        ("rate=uniform(2,1)", "`uniform(2,1)` has a low end that is not below its high end"),
        ("rate=int(1.5,3)", "`int(1.5,3)` has an end that is not whole"),
        ("rate=normal(0,1)", "`normal(0,1)` is no range"),
        ("rate=log(a,1)", "`log(a,1)` is no range"),
        ("rate=log(1,nan)", "`log(1,nan)` is no range"),
        ("rate=[]", "has no value in its list"),
        ("rate=[1, true, 1]", "`1` is in the list twice"),
        ("rate=", "`rate=` is not like `optimizer.learning_rate=[1e-4, 2e-4]`"),
        ("rate=[1", "is not YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_what_is_no_space_is_refused_in_words(override, message) -> None:
    found, problems = space.space_of([override])
    assert not found
    assert [problem.message for problem in problems] == [message]


def test_corners_try_each_value_and_each_end_once() -> None:
    found = space_of("rate=log(1e-5,1e-3)", "rank=[4, 8, 16]")
    assert [*space.corners(found)] == [
        {"rate": 1e-5, "rank": 4},
        {"rate": 1e-3, "rank": 4},
        {"rate": 1e-5, "rank": 8},
        {"rate": 1e-5, "rank": 16},
    ]


def test_settings_are_told_by_the_last_part_of_a_key_unless_two_share_it() -> None:
    keys = ["optimizer.learning_rate", "data.train[0].weight", "data.train[1].weight"]
    told = space.told({keys[0]: 1e-4, keys[1]: 1, keys[2]: "x"}, keys)
    assert told == "learning_rate=0.0001 data.train[0].weight=1 data.train[1].weight=x"
