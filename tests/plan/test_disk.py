"""What `plan` says of the disk is what a run takes."""

from pathlib import Path

import pytest

from finetune.plan import disk
from finetune.plan.memory import state_bytes
from finetune.recipe.load import load
from finetune.recipe.schema import Every
from finetune.store.run.directory import RunDirectory
from finetune.training.resolve import resolve

TRAIN = {"steps": 24, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}


def taken(run: Path) -> int:
    """Blocks on the disk; what is linked counts once."""
    found = {path.stat().st_ino: path.stat().st_blocks * 512 for path in run.rglob("*")}
    return sum(found.values())


@pytest.mark.slow
def test_the_disk_of_a_run_that_keeps_much_is_forecast(recipe_file, train, tmp_path) -> None:
    kept = {"every": "1 step", "keep": {"every": "1 step", "last": 1}}
    recipe = recipe_file(train=TRAIN, evaluate={"every": "4 steps"}, checkpoint=kept)
    run = train(recipe, tmp_path / "run")
    expected = disk.run_bytes(RunDirectory(run).plan()[0], layers=2) - disk.COMPANION_BYTES
    assert taken(run) < expected < 2 * taken(run)


@pytest.mark.parametrize(
    ("sections", "count"),
    [
        ({}, 2 + 2 + 1),
        ({"checkpoint": {"keep": {"last": 3, "best": 2}}}, 3 + 3 + 1),
        (
            {"checkpoint": {"keep": {"every": "6 steps"}}, "publish": {"repo": "a/b", "milestones": "4 steps"}},
            5 + 4 + 6 - 2,
        ),
    ],
    ids=["the lowest loss and what @best names stay by default", "more of them", "milestones stay and count once"],
)
def test_checkpoints_that_stay_are_counted(sections, count, recipe_file, monkeypatch) -> None:
    for name in ("_small_bytes", "_history_bytes"):
        monkeypatch.setattr(disk, name, lambda plan, layers: 0)
    made = resolve(load(recipe_file(train=TRAIN, **{"checkpoint": {}} | sections), ())).plan
    whole = disk.run_bytes(made) - disk.shared_bytes(made)
    packaged = disk.package_bytes(made) if "publish" in sections else 0
    assert whole == count * state_bytes(made) + packaged


def test_a_milestone_of_an_adapter_takes_the_room_of_the_whole_model_while_it_is_published(recipe_file) -> None:
    kept = {"every": "4 steps", "keep": {"every": "4 steps"}}
    made = resolve(load(recipe_file(train=TRAIN, checkpoint=kept, publish={"repo": "a/b"}), ())).plan
    following = made.recipe.publish.model_copy(update={"milestones": Every(steps=4)})
    with_milestones = made.model_copy(update={"recipe": made.recipe.model_copy(update={"publish": following})})
    more = disk.run_bytes(with_milestones) - disk.run_bytes(made)
    assert more == disk.COMPANION_BYTES + 4 * made.total_parameters > 4 * state_bytes(made)
