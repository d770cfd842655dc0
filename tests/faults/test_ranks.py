"""Two processes, one of which is killed between a snapshot and its commit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.faults.training import command, committed, differences, is_saving, unsound, wait_until
from tests import forks

TRAIN = {"steps": 60, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def launcher(recipe: Path, run: Path) -> list[str]:
    # the lone -- keeps torchrun from reading our --run as an abbreviation of its --run-path
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    return [*torchrun, *command(recipe, run)[2:]]


def rank_processes(pid: int) -> dict[int, int]:
    """The process id of each rank below a launcher."""
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry.removeprefix(b"RANK="))] = child
    return found


def stop_inside_a_save(pid: int, run: Path, launched: subprocess.Popen) -> None:
    """Stops rank 0 while an attempt is being written."""
    while True:
        assert wait_until(lambda: is_saving(run), launched), "the training ended first"
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # until what it was doing in the kernel is done
        if is_saving(run):
            return
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_inside_a_save_leaves_no_trace(victim, strategy, recipe_file, tmp_path) -> None:
    recipe = recipe_file(train={**TRAIN, "strategy": strategy}, checkpoint={"every": "4 steps", "keep": {"last": 3}})
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    forks.run(launcher(recipe, whole), check=True, capture_output=True, timeout=200)
    with log.open("w") as file, forks.Popen(launcher(recipe, run), stdout=file, stderr=file) as launched:
        assert wait_until(lambda: len(committed(log.read_text())) >= 2, launched), log.read_text()
        processes = rank_processes(launched.pid)
        stop_inside_a_save(processes[0], run, launched)
        os.kill(processes[victim], signal.SIGKILL)
        os.kill(processes[0], signal.SIGCONT)
        assert launched.wait(timeout=200) != 0
    assert unsound(run, log.read_text(), 3) == []
    again = forks.run(launcher(recipe, run), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "resumed from step " in again.stderr, again.stderr
    assert differences(whole, run) == []
