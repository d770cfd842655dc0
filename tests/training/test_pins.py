"""A checkpoint that another run begins with stays in its run."""

import pytest

from finetune.plan.plan import PinnedBase
from finetune.recipe.schema import Base
from finetune.store.checkpoints.pruning import prune
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.training import pins

BASE_ONLY = {"train": {"steps": 4, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}}


def steps(run) -> list[int]:
    return [checkpoint.step for checkpoint in Store(run).checkpoints()]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ref", "directory", "link"])
def test_it_outlives_the_keep_rules_of_its_run(form, recipe_file, train, tmp_path) -> None:
    kept = {"every": "2 steps", "keep": {"last": 2}}
    first = train(recipe_file(adapter=None, checkpoint=kept, **BASE_ONLY), tmp_path / "first")
    path = first / "checkpoints/step-00000002"
    if form == "link":
        (tmp_path / "linked").symlink_to(path)
    text = {"ref": f"{first}@2", "directory": str(path), "link": str(tmp_path / "linked")}[form]
    second = recipe_file("second", base={"checkpoint": text}, **BASE_ONLY)
    train(second, tmp_path / "second", "train.steps=1")
    assert [name.name[:19] for name in (first / "pins").iterdir()] == ["step-00000002-base-"]
    actions, pinned = prune(first, {"last": 1}, is_dry_run=False)
    assert actions == [] and steps(first) == [2, 4]
    assert pinned == [{"ref": f"{first}@2", "step": 2, "pins": [path.name for path in (first / "pins").iterdir()]}]
    for path in (first / "pins").iterdir():
        path.unlink()
    (action,), held = prune(first, {"last": 1}, is_dry_run=True)
    assert action["step"] == 2 and held == []
    Store(first).pin(2, "base-again")
    longer = recipe_file(adapter=None, checkpoint=kept, **BASE_ONLY)
    train(longer, first, "train.steps=8")
    assert steps(first) == [2, 6, 8]
    train(second, tmp_path / "second", "train.steps=2")


@pytest.mark.slow
def test_beneath_an_adapter_its_own_base_is_pinned_as_well(recipe_file, train, tmp_path) -> None:
    whole = train(recipe_file(adapter=None, **BASE_ONLY), tmp_path / "whole", "train.steps=1")
    adapter = train(
        recipe_file("two", base={"checkpoint": f"{whole}@1"}, **BASE_ONLY), tmp_path / "two", "train.steps=1"
    )
    for pin in (whole / "pins").iterdir():  # as a run that older code began
        pin.unlink()
    train(recipe_file("three", base={"checkpoint": f"{adapter}@1"}, **BASE_ONLY), tmp_path / "three", "train.steps=1")
    assert Store(adapter).pinned() == Store(whole).pinned() == {1}


@pytest.mark.slow
def test_a_run_that_may_not_be_written_is_begun_with_all_the_same(recipe_file, train, tmp_path, capsys) -> None:
    first = train(recipe_file(adapter=None, **BASE_ONLY), tmp_path / "first", "train.steps=1")
    (first / "pins").write_text("in the way")  # root may write everywhere else
    train(recipe_file("second", base={"checkpoint": f"{first}@1"}, **BASE_ONLY), tmp_path / "second", "train.steps=1")
    said = [line for line in capsys.readouterr().err.splitlines() if "pinned" in line]
    assert len(said) == 1 and said[0].startswith(
        f"{first}@1 could not be pinned, so its run may prune it: {first}/pins/"
    )
    assert max(journal.steps(journal.read(tmp_path / "second"))) == 1


def test_a_base_elsewhere_is_nothing_to_pin(tiny_base) -> None:
    pinned = PinnedBase(kind="directory", revision=None, digest=None)
    assert pins.pin_base(Base(checkpoint=str(tiny_base)), pinned, "r") == []
    for name in ("owner/name", f"{tiny_base}/gone", f"{tiny_base}@7"):
        assert pins.pin_base(Base(checkpoint=name), pinned, "r") == []
