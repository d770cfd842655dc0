"""Each tracker has what the run counts, read back by its own client. A client that is not installed is skipped."""

import importlib
from pathlib import Path

import pytest

from finetune.recipe.schema.trackers import SECTIONS
from finetune.training.trackers import _is_installed
from tests.training.trackers.readers import READERS
from tests.training.trackers.story import Told, assert_each_once, feed, tell


@pytest.fixture(params=READERS)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker whose client is installed, with a place for what it writes."""
    if not _is_installed(SECTIONS[request.param].package):
        pytest.skip(f"{request.param} is not installed")
    importlib.import_module(SECTIONS[request.param].package)  # once, and not in each process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return request.param


def test_every_tracker_has_a_reader_here() -> None:
    assert READERS.keys() == SECTIONS.keys() - {"csv"}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # some clients take seconds to start
@pytest.mark.parametrize("guard", [{}, {"spike": "rollback", "span": 3}], ids=["kills", "rollbacks"])
def test_twenty_kills_leave_each_step_once(name, guard, tmp_path, monkeypatch) -> None:
    told = Told(tmp_path / "run", name, guard)
    tell(told, name, 20, monkeypatch)
    assert_each_once(READERS[name](told.run), told)


def test_a_branch_has_its_own_steps(name, tmp_path) -> None:
    told = Told(tmp_path / "run", name, source="older-seed")
    told.begin(told.first)
    told.train(told.first + 5)
    feed(told.run, name)
    has = READERS[name](told.run)
    assert sorted(has["loss"]) == [*range(told.first + 1, told.first + 6)]
    assert_each_once(has, told)
