"""A run that is mirrored beside its training, and goes on elsewhere from there."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from tests import forks
from tests.stories.same_run import assert_same_run

COMMITS = {"every": "2 steps", "keep": {"last": 2}}


@pytest.fixture
def recipe(recipe_file, tmp_path) -> Path:
    mirror = {"to": f"file://{tmp_path}/bucket/{{run}}", "keep": {"last": 2}}
    return recipe_file(mirror=mirror, checkpoint=COMMITS, evaluate={"every": "3 steps"})


def test_a_run_goes_on_elsewhere_from_its_mirror_to_the_same_bits(recipe, recipe_file, tmp_path, finetune) -> None:
    undisturbed = finetune(
        "train", recipe_file("alone", checkpoint=COMMITS, evaluate={"every": "3 steps"}), "--run", tmp_path / "alone"
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    run = tmp_path / "runs" / "a"
    first = finetune("train", recipe, "--run", run, "--until", 4)
    assert first.returncode == 0, first.stderr
    assert f"mirror: file://{tmp_path}/bucket/a" in first.stderr
    assert "mirror: mirrored step 4" in first.stderr
    shutil.rmtree(run)
    second = finetune("train", recipe, "--run", tmp_path / "other" / "a")
    assert second.returncode == 0, second.stderr
    assert f"restored step 4 from file://{tmp_path}/bucket/a" in second.stderr
    assert "resumed from step 4" in second.stderr
    assert "finished at step 10" in second.stderr
    assert_same_run(tmp_path / "other" / "a", tmp_path / "alone")
    again = finetune("mirror", tmp_path / "other" / "a", "--json")
    assert json.loads(again.stdout) == {
        "mirror": f"file://{tmp_path}/bucket/a",
        "sent": [],
        "steps": [9, 10],
        "missing": [],
    }
