"""What a sweep will do is known, and what it cannot do is refused, before it begins."""

from pathlib import Path

import pytest

from finetune.compare.sweep import preview
from finetune.compare.sweep.asked import Asked, checked
from finetune.errors import DataError, FinetuneError, RecipeError
from finetune.plan import disk

RATES = "optimizer.learning_rate=[1e-4, 1e-3, 1e-2, 0.1]"


def spec_of(recipe: Path, *overrides: str, asked: list | None = None, workers: int = 1, **options: object):
    question = checked(Asked(recipe, overrides, **options))
    ask = (asked if asked is not None else []).append
    return preview.spec_of(question, recipe.parent / "sweep", workers, ask)


@pytest.mark.slow
def test_trials_of_one_kind_are_asked_about_once_and_counted_alone(recipe_file) -> None:
    asked: list = []
    spec = spec_of(recipe_file(), RATES, "train.steps=[4, 6]", "adapter.dropout=[0.0, 0.1]", asked=asked)
    assert len(asked) == 1
    assert (spec.trials, spec.steps) == (16, 8 * 4 + 8 * 6)
    assert spec.tokens > 0
    spec_of(recipe_file(), RATES, "adapter.rank=[2, 4]", asked=asked)
    assert len(asked) == 3


def test_halving_counts_what_its_rungs_train(recipe_file, monkeypatch) -> None:
    monkeypatch.setattr(preview, "devices_here", lambda environment: 0)
    spec = spec_of(recipe_file(), RATES, "train.seed=[1, 2]", halving=2, rungs=(2, 5))
    assert spec.rungs == (2, 5, 10)
    assert spec.steps == 8 * 2 + 4 * 3 + 2 * 5
    assert "rungs       8 to step 2, 4 to step 5, 2 to step 10" in preview.lines(spec, 1)
    assert any("need more memory than there is" in line for line in preview.lines(spec, 10_000))


def test_rungs_begin_at_a_fifth_of_the_length_and_grow_by_equal_factors() -> None:
    assert preview.rungs_of(4, (), 160, 16) == (32, 72, 160)
    assert preview.rungs_of(4, (), 160, 15) == (32, 160)
    assert preview.rungs_of(2, (), 3, 16) == (1, 2, 3)
    for arguments, message in (
        ((4, (), 160, 3), "3 trials of 160 steps cannot be halved by 4"),
        ((2, (), 1, 4), "4 trials of 1 step cannot be halved by 2"),
        ((2, (10, 160), 160, 4), "step 160 is not before the end, which is step 160"),
    ):
        with pytest.raises(RecipeError, match=message):
            preview.rungs_of(*arguments)


@pytest.mark.parametrize(
    ("overrides", "options", "kind", "message"),
    [
        (["task.max_length=[64, 48]"], {}, DataError, "on other held-out tokens than the first: max_length=48"),
        ([RATES, "data.holdout=0"], {}, DataError, "no row is held out"),
        ([RATES, "train.steps=[4, 6]"], {"halving": 2}, RecipeError, "these have 4 to 6 steps"),
        (["adapter.targets=[all-linear, [no_such]]"], {}, FinetuneError, "no_such"),
    ],
)
def test_what_cannot_be_compared_or_trained_is_refused(recipe_file, overrides, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        spec_of(recipe_file(), *overrides, **options)


def test_a_disk_without_room_for_all_runs_is_refused(recipe_file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 2**25)
    with pytest.raises(FinetuneError, match="4 runs need .* and the disk has 32.0 MiB left"):
        spec_of(recipe_file(), RATES)
