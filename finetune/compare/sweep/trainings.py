"""The trainings of a sweep on this machine: one `finetune train` for each trial, as you would start it by hand.

A process for each, not threads or forks: what a trial does to its memory, devices or precision ends with it, and a trial that is
killed for its memory takes no other with it. A sweep that is killed asks its trainings to commit and to end.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finetune.compare.sweep import space
from finetune.compare.sweep.directory import Sweep, Trial
from finetune.compare.sweep.queue import Task
from finetune.errors import RunError
from finetune.hosts.signals import PARENT
from finetune.hosts.world import OF_LAUNCHER, TOLD, devices_here
from finetune.recipe.yaml_nodes import Plain
from finetune.store.durable import failures, make_directory
from finetune.store.run.directory import RunDirectory
from finetune.store.run.lease import Lease

END_BYTES = 8192  # of a log: more than the last words of a training
OF_TASK = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
"""What a scheduler says about the sweep's own process. A trial is a training by itself."""


@dataclass
class Training:
    """A running trial."""

    trial: Trial
    task: Task
    claim: Lease
    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    log_begin: int
    step: int
    """The newest commit at its start."""
    told: int
    """The pipe with the code of its error."""

    def code(self) -> str:
        """The code of the error that it reported at its end; empty if it reported none."""
        os.set_blocking(self.told, False)
        try:
            return os.read(self.told, 100).decode()
        except BlockingIOError:
            return ""
        finally:
            os.close(self.told)

    def last_words(self) -> str:
        """The last line that it printed, without hints; empty if it printed nothing."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_begin, end - END_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not line.startswith("hint:")]
        return said[-1] if said else ""


def start(sweep: Sweep, trial: Trial, task: Task, claim: Lease, slot: int) -> Training:
    """Starts the training of a trial, or resumes it where it was committed last."""
    run = sweep.run(trial.number)
    told, given = os.pipe()
    with failures(sweep.log(trial.number), RunError):
        make_directory(sweep.log(trial.number).parent)
        with sweep.log(trial.number).open("ab") as log:
            begin = log.tell()
            process = _popen(command(sweep, trial, task.until, run), log, slot, sweep.spec.threads, given)
    os.close(given)
    return Training(trial, task, claim, slot, process, sweep.log(trial.number), begin, committed(run), told)


def command(sweep: Sweep, trial: Trial, until: int | None, run: Path) -> list[str]:
    """Also what you would type: no trial is trained in another way."""
    settings = [f"--set={each}" for each in space.arguments({**trial.settings, **_of_every_trial(sweep, trial)})]
    # Without locks in the file system the claim tells that the trial's last process is dead: the run's lease cannot.
    options = [f"--run={run}", "--quiet", "--take-over", *([f"--until={until}"] if until else [])]
    return [sys.executable, "-m", "finetune", "train", *settings, *options, "--", str(sweep.recipe)]


def _of_every_trial(sweep: Sweep, trial: Trial) -> dict[str, Plain]:
    """Settings beside a trial's own. They do not change what is trained."""
    recipe = sweep.recipe_with(trial.settings).recipe
    # Trials must not publish their milestones, and a mirror has one run.
    copies: dict[str, Plain] = {name: None for name in ("publish", "mirror") if getattr(recipe, name)}
    # A rung needs the held-out loss of its commit.
    is_evaluated = not sweep.spec.halving or recipe.checkpoint.keep.best
    return copies if is_evaluated else {**copies, "checkpoint.keep.best": 1}


def _popen(words: Sequence[str], log: BinaryIO, slot: int, threads: int, told: int) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in (*OF_LAUNCHER, *OF_TASK)}
    environment |= {TOLD: str(told), PARENT: str(os.getpid())}
    environment |= {"OMP_NUM_THREADS": str(threads), **device_of(slot, os.environ)}
    # A session: a ctrl-c in the terminal reaches the sweep alone, which asks each training once.
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        pass_fds=[told],
        start_new_session=True,
    )


def device_of(slot: int, environment: Mapping[str, str]) -> dict[str, str]:
    """One GPU for each training, in turn; nothing without GPUs."""
    devices = devices_here(environment)
    if not devices:
        return {}
    named = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": named[slot % devices].strip()}


def committed(run: Path) -> int:
    """The newest step of a run with a checkpoint; 0 without one."""
    return max(RunDirectory(run).stored_steps(), default=0)
