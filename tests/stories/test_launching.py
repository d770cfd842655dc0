"""`finetune launch` as what a container starts: as PID 1, under an init, with one rank and two; signalled, killed, started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
import yaml

from finetune.hosts.world import TOLD
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from tests import forks
from tests.lengths import length
from tests.stories.same_run import assert_same_run
from tests.stories.workers import free_port, two_ranks

LONG = {"steps": 400, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
SHORT = LONG | {"steps": 12}
FINETUNE = [sys.executable, "-m", "finetune"]
needs_namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="PID namespaces need root")


def launch(*arguments: object, ranks: int = 1) -> list[str]:
    return [*FINETUNE, "launch", "--nproc-per-node", str(ranks), *map(str, arguments)]


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_step(run: Path) -> int:
    return max(journal.steps(journal.read(run)), default=0)


def committed(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*/"))


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile, reaped or not
            if "train" in one.cmdline() and (environ := one.environ()).get(TOLD):
                found.append((int(environ.get("RANK", "0")), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


UNREACHABLE = """
from finetune.hosts.presence import Presence, UnreachableError

def refuse(*_):
    raise UnreachableError("connection refused")

Presence.connect = refuse
from finetune.cli import main
from tests import forks
main()
"""


@pytest.mark.slow
def test_a_rank_that_cannot_show_that_it_is_alive_says_so_and_trains(recipe_file, tmp_path) -> None:
    both = two_ranks("-c", UNREACHABLE, "train", recipe_file(), "--run", tmp_path / "run")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "warning: rank 1 cannot show rank 0 that it is alive (connection refused)" in said[1]


@pytest.mark.slow
def test_two_ranks_train_as_one_and_the_launcher_says_which_and_why(recipe_file, tmp_path) -> None:
    recipe = recipe_file(train=SHORT)
    words = (recipe, "--run", tmp_path / "two", "--set", "train.seed=3", "--until", 8, "--quiet")
    done = forks.run(launch(*words, ranks=2), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and last_step(tmp_path / "two") == 8, done.stderr
    assert RunDirectory(tmp_path / "two").plan()[0].recipe.train.seed == 3
    first, *lines = done.stderr.splitlines()
    assert first == "launch: 2 processes (as the flags say)"
    assert [line for line in lines if not line.startswith(("held-out loss at step ", "committed step "))] == []
    started = [record for record in journal.read(tmp_path / "two") if record.get("event") == "started"]
    assert [record["world"]["world_size"] for record in started] == [2]


@pytest.mark.slow
def test_an_error_of_the_recipe_or_the_data_is_told_once_and_not_tried_again(recipe_file, tmp_path) -> None:
    gone = recipe_file("gone", data={"train": [{"path": str(tmp_path / "gone.jsonl")}]})
    wrong = recipe_file("wrong", train={"steps": 0})
    for recipe, code, message in ((wrong, 2, "train.steps"), (gone, 1, "gone.jsonl: no such file")):
        done = forks.run(
            launch("--restarts", 3, recipe, "--run", tmp_path / "run"), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == code and done.stderr.count(message) == 1, done.stderr
        assert "starting again" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_and_ends_with_the_same_bits(recipe_file, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG | {"steps": 40}, checkpoint={"every": "4 steps"}), tmp_path / "killed"
    whole = forks.run(launch(recipe, "--run", tmp_path / "whole", ranks=2), capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stderr
    command = launch("--restarts", 3, recipe, "--run", run, ranks=2)
    with forks.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for step, rank in ((9, 0), (22, 1)):  # the one that writes the run, and the one that does not
            wait_for(lambda step=step: last_step(run) >= step, process)
            ranks_of(process)[rank].send_signal(signal.SIGKILL)
            wait_for(lambda step=step: len(ranks_of(process)) == 2 and last_step(run) > step + 4, process)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    for rank in (0, 1):
        assert f"launch: rank {rank} crashed (killed by SIGKILL); starting again from the last commit" in said
    assert "Traceback" not in said
    assert_same_run(tmp_path / "whole", run)


BAD_DISK = """
import errno, os
pread = os.preadv

def fail(*arguments):
    if os.environ.get("RANK") == "1":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return pread(*arguments)

os.preadv = fail
"""


@pytest.mark.slow
def test_an_error_on_one_host_is_started_again_on_none(recipe_file, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BAD_DISK)
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    recipe = recipe_file(adapter=None, train=SHORT | {"strategy": "fsdp"})
    where = ("--nnodes", 2, "--master-addr", "localhost", "--master-port", free_port(), "--run", tmp_path / "run")
    hosts = [
        forks.Popen(
            launch(*where, "--node-rank", place, "--restarts", 3, recipe),
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
        )
        for place in range(2)
    ]
    said = [host.communicate(timeout=200)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1], said
    assert "rank 1: cannot be read" in said[0] and "cannot be read" in said[1], said
    assert not any("starting again" in each for each in said), said


@pytest.mark.slow
def test_a_crash_is_started_again_no_more_often_than_was_asked_for(recipe_file, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG), tmp_path / "run"
    with forks.Popen(launch("--restarts", 1, recipe, "--run", run), stderr=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            before = last_step(run)
            wait_for(lambda before=before: last_step(run) > before, process)
            ranks_of(process)[0].send_signal(signal.SIGKILL)
            time.sleep(1)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 137 and said.count("starting again") == 1, said


def in_a_step(run: Path) -> bool:
    return last_step(run) >= 7


def in_a_save(run: Path) -> bool:
    return any((run / "attempts").glob("*"))


def in_an_evaluation(run: Path) -> bool:
    return last_step(run) >= 6  # what is evaluated then takes seconds


def evaluated(run: Path) -> set[int]:
    return {record["step"] for record in journal.read(run) if record.get("event") == "evaluated"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_sections) -> Callable[[int], Path]:
    """A function that gives a run of so many ranks that nobody disturbed; made once."""

    @cache
    def made(ranks: int) -> Path:
        place = tmp_path_factory.mktemp("undisturbed")
        adapter = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
        (place / "tiny.yaml").write_text(yaml.safe_dump(tiny_sections | {"adapter": adapter, "train": LONG}))
        words = launch(place / "tiny.yaml", "--run", place / "run", "--until", 60, "--quiet", ranks=ranks)
        forks.run(words, check=True, capture_output=True, timeout=250)
        return place / "run"

    return made


def assert_same_steps(run: Path, other: Path) -> None:
    """Of both runs, as far as they go: losses, norms and rates, to the bit."""
    steps, others = journal.steps(journal.read(run)), journal.steps(journal.read(other))
    both = steps.keys() & others.keys()
    assert len(both) >= 6
    assert {step: journal.difference(steps[step], others[step]) for step in both} == dict.fromkeys(both)


MOMENTS = {
    "step": (in_a_step, {}),
    "save": (in_a_save, {"checkpoint": {"every": "3 steps"}}),
    "evaluation": (in_an_evaluation, {"evaluate": {"every": "6 steps"}}),
}
STARTERS = {"python": [], "launch": [], "launch under tini": ["tini", "--"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_namespaces
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("starter", STARTERS)
def test_as_pid_1_a_signal_at_any_moment_ends_in_a_commit(
    starter, ranks, recipe_file, tmp_path, chat_data, undisturbed
) -> None:
    if starter == "python" and ranks == 2:
        pytest.skip("plain python starts one process")
    assert not STARTERS[starter] or shutil.which("tini"), "`scripts/test --all` installs tini where it can"
    many = tmp_path / "many.jsonl"
    many.write_text((chat_data / "holdout.jsonl").read_text() * 50)
    chosen = (list(STARTERS).index(starter) + ranks) % len(MOMENTS)
    for moment in length([list(MOMENTS)[chosen]], list(MOMENTS)):
        is_there, sections = MOMENTS[moment]
        if moment == "evaluation":
            sections = sections | {
                "data": {
                    "train": [{"path": str(chat_data / "train.jsonl")}],
                    "holdout": [{"path": str(many)}],
                }
            }
        recipe, run = recipe_file(moment, train=LONG, **sections), tmp_path / moment
        what = [*FINETUNE, "train", str(recipe)] if starter == "python" else launch(recipe, ranks=ranks)
        command = [*forks.AS_PID_1, *STARTERS[starter], *what, "--run", str(run)]
        popen = forks.Popen if starter == "launch" else subprocess.Popen  # what python and tini start is new
        with popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_for(lambda run=run, is_there=is_there: is_there(run), process)
            (first,) = psutil.Process(process.pid).children()
            first.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=250)
        assert process.returncode == 143, f"{moment}: {said}"
        stopped = last_step(run)
        assert committed(run)[-1] == stopped, f"{moment}: {said}"
        assert moment != "evaluation" or (stopped == 6 and 6 not in evaluated(run)), "it was over"
        again = forks.run([*what, "--run", str(run), "--until", str(stopped + 2)], capture_output=True)
        assert again.returncode == 0, again.stderr.decode()
        resumed = [record for record in journal.read(run) if record.get("event") == "started"][-1]
        assert (resumed["step"], last_step(run)) == (stopped, stopped + 2)
        assert_same_steps(undisturbed(ranks), run)


@pytest.mark.slow
def test_a_signal_that_comes_twice_at_once_is_one_signal(recipe_file, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG), tmp_path / "run"
    with forks.Popen(launch(recipe, "--run", run, ranks=2), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: in_a_step(run), process)
        for one in (process.pid, *(rank.pid for rank in ranks_of(process))):  # as a scheduler that signals all
            os.kill(one, signal.SIGTERM)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 143 and committed(run)[-1] == last_step(run), said


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_ranks_along_and_they_commit(recipe_file, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG), tmp_path / "run"
    with forks.Popen(launch(recipe, "--run", run, ranks=2), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: in_a_step(run), process)
        ranks = ranks_of(process)
        process.kill()
        assert psutil.wait_procs(ranks, timeout=200)[1] == []
    assert committed(run)[-1] == last_step(run) < LONG["steps"]


@pytest.mark.slow
def test_sigusr1_to_the_launcher_saves_and_the_training_goes_on(recipe_file, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG, checkpoint={"every": "9999 steps"}), tmp_path / "run"
    with forks.Popen(launch(recipe, "--run", run, ranks=2), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: in_a_step(run), process)
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: committed(run) if (run / "checkpoints").exists() else False, process)
        step = last_step(run)
        wait_for(lambda: last_step(run) > step + 3, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert json.loads((run / "checkpoints" / f"step-{last_step(run):08d}" / "manifest.json").read_text())["step"]
