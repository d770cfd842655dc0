"""What is asked of a sweep: every problem at once, before anything is trained or made."""

from pathlib import Path

import pytest

from finetune.compare.sweep.asked import Asked, Question, checked
from finetune.errors import RecipeError

RATES = "optimizer.learning_rate=[1e-4, 1e-3]"


def asked(recipe: Path, *overrides: str, **options: object) -> Question:
    return checked(Asked(recipe, overrides, **options))


def test_all_problems_are_found_at_once(recipe_file) -> None:
    spaces = (
        "optimizer.learning_rate=[1e-4, 20]",
        "adapter.rank=[4, 0]",
        "optimizer.betas=[0.9, 0.95]",
        "train.batchsize=[1, 2]",
        "train.seed=log(1, 2)",
        "train.steps=[]",
    )
    with pytest.raises(RecipeError) as refused:
        asked(recipe_file(), *spaces, rungs=(4, 2))
    told = str(refused.value)
    for line in (
        "--set: optimizer.learning_rate: must be less than 10, not `20`",
        "--set: adapter.rank: must be greater than 0, not `0`",
        "--set: optimizer.betas: must be two numbers like `[0.9, 0.999]`, not `0.9`",
        "hint: a list has the values to try; write a list that is one value as `[[…]]`",
        "--set: train.batchsize: unknown key",
        "--set: train.seed: is a range, and a grid needs values",
        "--set: train.steps: has no value in its list",
        "--rungs: goes with --halving",
        "--rungs: must rise, like `--rungs 20,80`",
    ):
        assert line in told, line


def test_trials_are_the_recipe_with_their_settings(recipe_file) -> None:
    question = asked(recipe_file(), RATES, "adapter.rank=[2, 4]", "train.seed=5")
    recipes = [question.recipe_of(settings).recipe for settings in question.settings]
    assert [(each.optimizer.learning_rate, each.adapter.rank) for each in recipes] == [
        *((1e-4, 2), (1e-4, 4), (1e-3, 2), (1e-3, 4)),
    ]
    assert {each.train.seed for each in recipes} == {5}


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["train.seed=1"], {}, "there is nothing to try"),
        ([RATES], {"random": 3}, "there are 2 combinations"),
        (["train.seed=int(1, 3)"], {"random": 4}, "the ranges have 3 trials"),
        ([RATES], {"random": 2, "tpe": 2}, "does not go with --random"),
        ([RATES], {"tpe": 2, "halving": 2}, "does not go with --tpe"),
    ],
)
def test_options_that_do_not_go_together_are_refused(recipe_file, overrides, options, message) -> None:
    with pytest.raises(RecipeError, match=message):
        asked(recipe_file(), *overrides, **options)


def test_a_recipe_that_is_wrong_by_itself_is_refused_with_its_lines(recipe_file) -> None:
    with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+: train\.batch_size"):
        asked(recipe_file(train={"steps": 4, "batch_size": 0}), RATES)


def test_tpe_is_asked_about_each_value_and_each_end_of_a_range(recipe_file) -> None:
    with pytest.raises(RecipeError) as refused:
        asked(recipe_file(), "optimizer.learning_rate=log(1e-5, 20)", "adapter.rank=[2, 0]", tpe=5)
    assert [problem.key for problem in refused.value.problems] == ["optimizer.learning_rate", "adapter.rank"]
    assert asked(recipe_file(), "optimizer.learning_rate=log(1e-5, 1e-2)", tpe=5).trials == 5
