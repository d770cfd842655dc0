"""A training needs nobody who listens."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.store.run import journal
from tests import forks

FINETUNE = [sys.executable, "-m", "finetune"]
WHAT = {"train": ["train"], "launch": ["launch", "--nproc-per-node", "2"]}
EACH = ["train", pytest.param("launch", marks=pytest.mark.slow)]
CLOSED = "import os, sys; os.closerange(0, 3); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture
def recipe(recipe_file) -> Path:
    return recipe_file(train={"steps": 60, "precision": "fp32", "batch_size": 6}, checkpoint={"every": "5 steps"})


def is_whole(run: Path) -> bool:
    return max(journal.steps(journal.read(run))) == 60 and (run / "checkpoints" / "step-00000060").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("what", EACH)
def test_a_training_outlives_the_reader_of_what_it_says(what, recipe, tmp_path) -> None:
    with forks.Popen([*FINETUNE, *WHAT[what], recipe, "--run", tmp_path / "run"], stderr=subprocess.PIPE) as process:
        while b"committed step 5" not in process.stderr.readline():
            assert process.poll() is None
        process.stderr.close()
        assert process.wait(timeout=200) == 0
    assert is_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("what", EACH)
def test_a_training_whose_log_is_on_a_full_disk_goes_on(what, recipe, tmp_path) -> None:
    with open("/dev/full", "w") as full:
        done = forks.run([*FINETUNE, *WHAT[what], recipe, "--run", tmp_path / "run"], stderr=full, timeout=200)
    assert done.returncode == 0 and is_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("what", WHAT)
def test_no_file_of_a_run_takes_the_place_of_a_closed_stream(what, recipe, tmp_path) -> None:
    """What native code says would be written into it."""
    found = tmp_path / "found"
    spy = tmp_path / "spy" / "sitecustomize.py"
    spy.parent.mkdir()
    spy.write_text(
        "import atexit, os\n"
        f"look = lambda: [os.readlink(f'/proc/self/fd/{{number}}') for number in range(3)]\n"
        f"atexit.register(lambda: open({str(found)!r}, 'a').write(repr(look()) + '\\n'))\n"
    )
    words = [sys.executable, "-m", "finetune", *WHAT[what], recipe, "--run", tmp_path / "run"]
    path = os.pathsep.join([str(spy.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", CLOSED, *words], env=os.environ | {"PYTHONPATH": path}, timeout=200)
    assert done.returncode == 0 and is_whole(tmp_path / "run")
    assert set(found.read_text().splitlines()) == {repr(["/dev/null"] * 3)}


def test_a_command_whose_data_nobody_takes_fails(tmp_path) -> None:
    with open("/dev/full", "w") as full:
        done = forks.run([*FINETUNE, "doctor", "--json"], stdout=full, stderr=subprocess.PIPE, timeout=100)
    assert done.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("what", EACH)
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_training_whose_reader_stalls_goes_on(kind, what, recipe, tmp_path) -> None:
    """A pager, a log driver that blocks, a terminal behind a connection that sleeps."""
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    with forks.Popen([*FINETUNE, *WHAT[what], recipe, "--run", tmp_path / "run"], stderr=writer) as process:
        deadline = time.monotonic() + 200
        while max(journal.steps(journal.read(tmp_path / "run")), default=0) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while os.write(writer, b"x" * 100):  # until it is full
                pass
        os.set_blocking(writer, True)
        assert process.poll() is None
        assert process.wait(timeout=200) == 0
    os.close(writer)
    os.close(reader)
    assert is_whole(tmp_path / "run")
