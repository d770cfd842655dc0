"""Real processes: killed, stopped, doubled, side by side."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from finetune.store.run import journal, row_losses
from tests import forks
from tests.stories.same_run import assert_same_run
from tests.stories.workers import free_port

ROOT = Path(__file__).parents[2]
LONG = {"steps": 400, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}


def start(*arguments: object) -> subprocess.Popen:
    return forks.Popen(
        [sys.executable, "-m", "finetune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(ranks: int, recipe: Path, run: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # the lone -- keeps torchrun from reading our --run as an abbreviation of its --run-path
    return [*launcher, "-m", "--", "finetune", "train", str(recipe), "--run", str(run), "--quiet"]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(journal.steps(journal.read(run)), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def events(run: Path, name: str) -> list[dict]:
    return [record for record in journal.read(run) if record.get("event") == name]


@pytest.fixture(params=[signal.SIG_DFL])
def hangups(request) -> Iterator[None]:
    """How what is started takes a SIGHUP, also where the tests run under `nohup`."""
    previous = signal.signal(signal.SIGHUP, request.param)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((signal.SIGINT, 130), (signal.SIGHUP, 129))),
    ],
)
def test_a_signal_ends_with_the_last_finished_step_committed(number, code, recipe_file, finetune, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG, checkpoint={"every": "100 steps"}), tmp_path / "run"
    process = start("train", recipe, "--run", run)
    wait_for_step(run, 7)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    last = max(journal.steps(journal.read(run)))
    assert said.splitlines()[-1] == f"committed step {last}"
    log = json.loads(finetune("log", run, "--json").stdout)
    assert [checkpoint["step"] for checkpoint in log["checkpoints"]][-1] == last


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("hangups", [signal.SIG_IGN], indirect=True)
def test_under_nohup_a_terminal_that_goes_away_ends_nothing(recipe_file, tmp_path) -> None:
    process = start("train", recipe_file(train=LONG), "--run", tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGHUP)
    wait_for_step(tmp_path / "run", max(journal.steps(journal.read(tmp_path / "run"))) + 3)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once_and_commits_nothing(recipe_file, tmp_path) -> None:
    command = [sys.executable, "-m", "finetune", "train", str(recipe_file()), "--run", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)  # a fork would have trained before the signal comes
    time.sleep(1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_signal_ends_a_rank_that_stands_in_native_code(recipe_file, tmp_path) -> None:
    """It waits for a host that does not come, in a call that hears of no Python handler."""
    port = free_port()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "finetune", "train", recipe_file(), "--run", tmp_path / "run"]
    with forks.Popen(command, env=os.environ | alone, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while not is_open(port):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 143


def is_open(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_second_process_on_a_run_directory_refuses(recipe_file, finetune, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG), tmp_path / "run"
    first = start("train", recipe, "--run", run)
    wait_for_step(run, 3)
    first.send_signal(signal.SIGSTOP)  # holds the lock, and will not finish before the second has looked
    second = finetune("train", recipe, "--run", run)
    assert second.returncode == 1
    assert f"{run}: is in use by process {first.pid} on " in second.stderr
    assert "Traceback" not in second.stderr
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_two_processes_give_the_losses_and_rows_of_one(recipe_file, finetune, tmp_path) -> None:
    recipe = recipe_file(train={"steps": 8, "batch_size": 9, "precision": "fp32", "micro_batch_tokens": 128})
    one, two = tmp_path / "one", tmp_path / "two"
    assert finetune("train", recipe, "--run", one).returncode == 0
    result = forks.run(torchrun(2, recipe, two), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "finished at step 8" in result.stderr.splitlines()
    steps, others = journal.steps(journal.read(one)), journal.steps(journal.read(two))
    for step in range(1, 9):
        assert others[step]["loss"] == pytest.approx(steps[step]["loss"], rel=1e-5)
        assert others[step]["grad_norm"] == pytest.approx(steps[step]["grad_norm"], rel=1e-4)
        rows = [[loss.row for loss in row_losses.read_rows(run, step)] for run in (one, two)]
        assert rows[0] == rows[1]
    (first,), (second,) = events(one, "evaluated")[-1:], events(two, "evaluated")[-1:]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


def accelerate(recipe: Path, run: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "finetune", "train", str(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return forks.run([*command, "--run", str(run)], capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.slow
def test_accelerate_launch_runs_the_same_program(recipe_file, tmp_path) -> None:
    recipe = recipe_file(train={"steps": 2, "batch_size": 6, "precision": "fp32"})
    result = accelerate(recipe, tmp_path / "run", "--cpu", "--num_processes", "1")
    assert result.returncode == 0, result.stderr
    assert "finished at step 2" in result.stderr.splitlines()


@pytest.mark.parametrize("says", ["flags", pytest.param("configuration", marks=pytest.mark.slow)])
def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_refused(says, recipe_file, tmp_path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    asked = {"distributed_type": "MULTI_CPU", "num_processes": 2, "num_machines": 1, "use_cpu": True}
    config.write_text(json.dumps(asked | {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no"}))
    flags = ["--cpu", "--num_processes", "2"] if says == "flags" else ["--config_file", str(config)]
    result = accelerate(recipe_file(), run, *flags)
    assert result.returncode == 1
    assert "the launcher was asked for 2 processes, and 1 know of each other" in result.stderr
    assert not run.exists()


def test_half_of_what_a_launcher_sets_is_refused(recipe_file, finetune, tmp_path) -> None:
    half = finetune("train", recipe_file(), "--run", tmp_path / "run", env=os.environ | {"WORLD_SIZE": "2"})
    assert (half.returncode, half.stderr.splitlines()[0]) == (1, "environment: has WORLD_SIZE alone")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_run_says_so_and_does_nothing(recipe_file, finetune, tmp_path) -> None:
    recipe, run = recipe_file(train={"steps": 3, "batch_size": 6, "precision": "fp32"}), tmp_path / "run"
    first = finetune("train", recipe, "--run", run, "--quiet")
    assert [line for line in first.stderr.splitlines() if line[0] in "rcf"] == [
        "committed step 3",
        "finished at step 3",
    ]
    before = sorted(path.name for path in run.rglob("*") if path.name != "lease.json")
    again = finetune("train", recipe, "--run", run, "--quiet")
    assert (again.returncode, again.stderr.splitlines()) == (0, ["resumed from step 3", "finished at step 3"])
    assert sorted(path.name for path in run.rglob("*") if path.name != "lease.json") == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_sigkills_leave_no_trace(recipe_file, tmp_path) -> None:
    short = LONG | {"steps": 100}
    recipe = recipe_file(train=short, checkpoint={"every": "3 steps", "keep": {"last": 2, "best": 1}})
    command = [sys.executable, ROOT / "scripts/faults/sigkill.py", recipe, "--kills", "20", "--work", tmp_path]
    result = forks.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal: every tensor" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_are_killed_together_leave_no_trace(ranks, recipe_file, tmp_path) -> None:
    sections = {"steps": 40, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 64}
    recipe = recipe_file(train=sections, checkpoint={"every": "4 steps"})
    whole, run = tmp_path / "whole", tmp_path / "killed"
    start_whole = subprocess.run if ranks == 2 else forks.run  # once not in forks, as those that are killed
    start_whole(torchrun(ranks, recipe, whole), check=True, capture_output=True, timeout=240)
    for step, is_saving in ((3, False), (10, True), (19, False), (26, True)):
        process = forks.Popen(torchrun(ranks, recipe, run), stderr=subprocess.DEVNULL)
        wait_for_step(run, step)
        if is_saving:
            wait_for_attempt(run)
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:
            member.kill()
        assert process.wait() == -signal.SIGKILL
        assert psutil.wait_procs(tree, timeout=60)[1] == []
        assert max(journal.steps(journal.read(run))) < 40
    forks.run(torchrun(ranks, recipe, run), check=True, capture_output=True, timeout=240)
    assert_same_run(whole, run)


def wait_for_attempt(run: Path) -> None:
    deadline = time.monotonic() + 240
    while not any(run.glob("attempts/*")):
        assert time.monotonic() < deadline
