"""A clock that jumps back: which checkpoint is newer, better or older is never a question of time."""

import os
from pathlib import Path

import pytest

from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from scripts.faults.training import differences

DAY = 86_400


def turn_back(run: Path, step: int) -> None:
    """Later steps become older: each step's files are dated so many days before those of the step before."""
    for path in sorted((run / "checkpoints").iterdir()):
        at = 4_000_000_000 - int(path.name.removeprefix("step-")) * DAY
        for file in [*path.iterdir(), path]:
            os.utime(file, (at, at))
    for path in run.iterdir():
        os.utime(path, (step, step))


def test_the_newest_and_the_best_do_not_depend_on_any_date(tmp_path) -> None:
    run = tmp_path / "run"
    store = Store(run)
    for step, year in ((100, 2040), (200, 1999), (300, 1970)):
        attempt = store.begin(step, "a1")
        attempt.write_bytes("state.json", b"{}")
        facts = {"metrics": {"loss": 1.0}, "created": f"{year}-01-01T00:00:00+00:00"}
        store.commit(attempt, Manifest(run="r", attempt="a1", step=step, parent=None, plan_id="p", **facts))
    turn_back(run, 0)
    assert store.newest_sound()[0].step == 300
    assert [find(parse(f"{run}@{name}")).step for name in ("last", "best")] == [300, 300]


@pytest.mark.slow
def test_a_run_whose_clock_jumped_back_resumes_from_its_newest_step(recipe_file, train, tmp_path, capsys) -> None:
    recipe = recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 3, "best": 1}})
    whole, run = train(recipe, tmp_path / "whole"), train(recipe, tmp_path / "run")
    store = Store(run)
    store.remove(store.find(10))
    turn_back(run, 0)
    capsys.readouterr()
    train(recipe, run)
    assert "resumed from step 8" in capsys.readouterr().err
    assert [item.step for item in store.checkpoints()] == [4, 8, 10]
    assert differences(whole, run) == []
