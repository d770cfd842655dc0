"""A disk that fills up, turns read-only or is gone in the middle of a training, and a directory that nobody may write any more."""

import array
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.faults import training as trainings
from scripts.faults.disk import CannotMount, make_image, mounted
from scripts.faults.training import command, committed, differences, finish, unsound, wait_until
from tests import forks

KEEP = 3
TRAIN = {"steps": 120, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
FS_IOC_SHUTDOWN, NO_FLUSH = 0x8004587D, 2  # linux/fs.h: the file system answers everything with an error from now on


@pytest.fixture(autouse=True)
def _forks(monkeypatch) -> None:
    monkeypatch.setattr(trainings, "subprocess", forks.Either)


@pytest.fixture
def recipe(recipe_file) -> Path:
    return recipe_file(train=TRAIN, checkpoint={"every": "4 steps", "keep": {"last": KEEP}})


@pytest.fixture
def image(tmp_path) -> Path:
    """An ext4 of 32 MB in a file; the test is skipped where it cannot be mounted."""
    try:
        image = make_image(tmp_path / "disk.img", "32M")
        with mounted(image, tmp_path / "disk"):
            return image
    except CannotMount as error:
        pytest.skip(f"an image cannot be mounted: {error}")


class Training:
    """A training in a process of its own; what it says goes to a file that is not on its disk."""

    def __init__(self, recipe: Path, run: Path, log: Path, before: tuple[str, ...] = ()):
        self._log = log
        with log.open("w") as file:
            self.process = forks.Either.Popen([*before, *command(recipe, run)], stderr=file)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until_said(self, text: str, times: int = 1) -> None:
        assert wait_until(lambda: self.said.count(text) >= times, self.process), self.said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def assert_ends_with_one_clear_error(self) -> None:
        assert self.process.wait(timeout=100) == 1, self.said
        assert "Traceback" not in self.said and self.said.count("hint: ") == 1, self.said


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@pytest.mark.slow
def test_a_full_disk_skips_saves_and_the_run_goes_on(recipe, image, train, tmp_path) -> None:
    whole, disk = train(recipe, tmp_path / "whole"), tmp_path / "disk"
    with mounted(image, disk):
        with Training(recipe, disk / "run", tmp_path / "log") as training:
            training.wait_until_said("committed step ", 2)
            fill(disk / "filler")
            training.wait_until_said(" skipped")
            assert "save of step " in training.said
            (disk / "filler").unlink()
            training.wait_until_said("committed step ", len(committed(training.said)) + 2)
            assert training.process.wait(timeout=100) == 0, training.said
        assert differences(whole, disk / "run") == []
        assert unsound(disk / "run", training.said, KEEP) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["read-only", "gone"])
def test_a_disk_that_fails_ends_the_run_clearly_and_a_resume_ends_as_if_it_had_not(
    kind, recipe, image, train, tmp_path
) -> None:
    whole, disk = train(recipe, tmp_path / "whole"), tmp_path / "disk"
    with mounted(image, disk), Training(recipe, disk / "run", tmp_path / "log") as training:
        training.wait_until_said("committed step ", 2)
        if kind == "read-only":
            # what ext4 does by itself on an error; a plain remount is refused while a file is open for writing
            subprocess.run(["mount", "-o", "remount,abort", disk], check=True)
        else:
            directory = os.open(disk, os.O_RDONLY)
            fcntl.ioctl(directory, FS_IOC_SHUTDOWN, array.array("I", [NO_FLUSH]))
            os.close(directory)
        training.assert_ends_with_one_clear_error()
    with mounted(image, disk):
        assert unsound(disk / "run", training.said, KEEP) == []
        assert finish(recipe, disk / "run") == []
        assert differences(whole, disk / "run") == []


@pytest.mark.slow
def test_a_directory_that_may_not_be_written_any_more_ends_the_run_clearly(recipe, train, tmp_path) -> None:
    # root may write everywhere: without its capabilities it is a user like any other, who owns these files
    as_user = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--") if os.geteuid() == 0 else ()
    if as_user and (shutil.which("setpriv") is None or subprocess.run([*as_user, "true"]).returncode):
        pytest.skip("root cannot give up its capabilities here")
    whole, run = train(recipe, tmp_path / "whole"), tmp_path / "run"
    with Training(recipe, run, tmp_path / "log", as_user) as training:
        training.wait_until_said("committed step ", 2)
        (run / "attempts").chmod(0o555)
        training.assert_ends_with_one_clear_error()
    assert "permission denied\nhint: check owner and permissions" in training.said
    (run / "attempts").chmod(0o755)
    assert unsound(run, training.said, KEEP) == []
    assert finish(recipe, run) == []
    assert differences(whole, run) == []
