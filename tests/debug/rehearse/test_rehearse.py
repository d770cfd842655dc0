"""Rehearsals as a user runs them: equal, not equal, ended early, and where they cannot be."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetune.debug.rehearse.rehearse import Rehearsal, listing, rehearse
from finetune.debug.rehearse.trainings import TrainingError
from finetune.errors import RunError
from finetune.recipe.load import load
from tests import forks

LONG = {"steps": 400, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
# Starts a program with another setting, when it is the resumed one.
LAUNCHER = """
import os, sys
from pathlib import Path
count = Path(__file__).with_suffix(".count")
started = len(count.read_text()) if count.exists() else 0
count.write_text("+" * (started + 1))
added = ["--set", "train.micro_batch_tokens=64"] if started == 1 else []
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[3:], *added])
"""


@pytest.mark.slow
def test_a_resume_that_is_not_exact_is_found_out(recipe_file, finetune, tmp_path) -> None:
    launcher, run = tmp_path / "launcher.py", tmp_path / "runs/planned"
    launcher.write_text(LAUNCHER)
    options = ["--run", run, "--launcher", shlex.join([sys.executable, str(launcher)]), "--no-package", "--json"]
    result = finetune("rehearse", recipe_file(train=LONG), *options)
    assert result.returncode == 1, result.stderr
    facts = json.loads(result.stdout)
    first = facts["first_difference"]
    assert (facts["ok"], first["step"]) == (False, facts["resumed_from"] + 1)
    assert first["uninterrupted"] != first["resumed"]
    assert list(run.parent.iterdir()) == []
    said = listing(facts).splitlines()[0]
    assert said.startswith(
        f"not exact   step {first['step']}: {first['quantity']} is {first['uninterrupted']} in one go"
    )
    assert "before the kill" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    ["", "-m torch.distributed.run --standalone --nproc-per-node 2", "-m finetune launch --nproc-per-node 2"],
    ids=["alone", "torchrun", "launch"],
)
def test_a_killed_run_equals_one_left_alone(launcher, recipe_file, finetune, tmp_path) -> None:
    recipe, run = recipe_file(train=LONG), tmp_path / "planned"
    options = ["--launcher", f"{sys.executable} {launcher}"] if launcher else []
    result = finetune("rehearse", recipe, "--run", run, "--json", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads(result.stdout)
    assert (facts["ok"], facts["first_difference"]) == (True, None)
    assert 0 < facts["resumed_from"] < facts["killed_at"]
    assert facts["steps"] == facts["compared"]["steps"] == facts["resumed_from"] + 2
    assert facts["compared"]["rows"] == 6 * facts["steps"]
    assert {"tensors", "logits"} & {check.partition(":")[0] for check in facts["package"]["checks"]}
    assert facts["step_seconds"] > 0 and facts["smallest_interval"]["steps"] >= 1
    assert not run.with_name("planned.rehearsal").exists()
    assert listing(facts).startswith("exact ")


@pytest.mark.slow
def test_sigterm_ends_the_trainings_and_leaves_no_directory(recipe_file, tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "finetune",
        "rehearse",
        str(recipe_file(train=LONG)),
        "--run",
        str(tmp_path / "run"),
    ]
    process = forks.Popen(command, stderr=subprocess.DEVNULL)
    lease = tmp_path / "run.rehearsal/resumed/lease.json"
    training = wait_for_pid(lease, process)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not lease.parents[1].exists()
    assert is_gone(training)


def is_gone(pid: int) -> bool:
    """Or a zombie, until PID 1 reaps it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_pid(lease: Path, process: subprocess.Popen) -> int:
    deadline = time.monotonic() + 100
    while not (lease.exists() and lease.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(lease.read_text())["pid"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_trained(recipe_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("finetune.plan.disk.free_bytes", lambda directory: 2**20)
    with pytest.raises(RunError, match="a rehearsal needs 24.[0-9] MiB, and the disk has 1.0 MiB left"):
        rehearse(Rehearsal(load(recipe_file()), (), tmp_path / "run"))
    assert not list(tmp_path.glob("run*"))


def test_trainings_of_a_rehearsal_are_not_mirrored(recipe_file, tmp_path) -> None:
    rehearsal = Rehearsal(load(recipe_file(mirror="file:///mirror")), (), tmp_path / "run")
    assert "mirror=null" in rehearsal.command(tmp_path / "scratch", 4, 2)


@pytest.mark.slow
def test_a_plan_that_is_too_short_is_refused(recipe_file, tmp_path) -> None:
    with pytest.raises(RunError, match="the plan has 10 steps, and a rehearsal needs 12\nhint: use --steps 5"):
        rehearse(Rehearsal(load(recipe_file()), (), tmp_path / "run", steps=6))


@pytest.mark.slow
def test_a_training_that_fails_is_told_in_its_own_words(recipe_file, tmp_path) -> None:
    recipe = recipe_file(base={"checkpoint": str(tmp_path / "nothing")})
    with pytest.raises(TrainingError, match="the training ended with exit code 1:\n(.|\n)*nothing") as caught:
        rehearse(Rehearsal(load(recipe), (), tmp_path / "run"))
    assert caught.value.exit_code == 1


def test_a_launcher_that_is_not_there_is_named(recipe_file, tmp_path) -> None:
    with pytest.raises(TrainingError, match="cannot start `no-such-launcher`"):
        rehearse(Rehearsal(load(recipe_file()), (), tmp_path / "run", launcher="no-such-launcher"))
    assert not (tmp_path / "run.rehearsal").exists()
