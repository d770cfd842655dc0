"""Rehearses a planned run: a killed and resumed training and an uninterrupted one must end with the same bits.

It then packages a checkpoint and reports its cost. Imports no torch: the processes do.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

from finetune.debug.rehearse.cost import SHARE, measure
from finetune.debug.rehearse.equality import compared, first_difference
from finetune.debug.rehearse.shown import Costs, DifferenceRecord, Outcome, PackageOutcome
from finetune.debug.rehearse.trainings import TrainingError, Trainings, trainings_beside
from finetune.errors import RunError, counted
from finetune.plan import cadence, disk, memory
from finetune.plan.disk import readable
from finetune.plan.plan import Plan
from finetune.recipe.load import LoadedRecipe
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory

# In units of `steps`: the end of the training to be killed. Late enough to kill it before; early enough that it does not run for
# days if the rehearsal itself is killed.
LONGEST = 10
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal, in the words of the command line."""

    loaded: LoadedRecipe
    overrides: Sequence[str]
    run: Path
    steps: int = 2
    """Before the kill, and after the resume; at least 2, because the first step of a process is not measured."""
    launcher: str = ""
    """Starts the trainings, like `finetune launch` or `torchrun --nproc-per-node 2`."""
    has_package: bool = True
    is_kept: bool = False

    def command(self, run: Path, until: int, every: int) -> list[str]:
        """`finetune train` up to a step, with a save every `every` steps; these settings do not change the training."""
        given = shlex.split(self.launcher)
        is_ours = any(Path(word).name == "finetune" and after == "launch" for word, after in pairwise(given))
        if is_ours:  # `finetune launch` starts `train` itself
            start = given
        elif given:  # without the lone --, torchrun reads our options as its own
            start = [*given, "-m", "--", "finetune", "train"]
        else:
            start = [sys.executable, "-m", "finetune", "train"]
        added = [f"checkpoint.every={every} steps", "checkpoint.keep={last: 1}", "evaluate.every=null"]
        added += ["mirror=null", "track=[]", "trackers=null"]  # the older key, too
        settings = [word for setting in [*self.overrides, *added] for word in ("--set", setting)]
        return [*start, self.loaded.file, "--run", str(run), "--until", str(until), "--quiet", *settings]


def rehearse(rehearsal: Rehearsal) -> Outcome:
    """The object of `rehearse --json`; `ok` says whether everything was equal and could be packaged.

    Raises RunError if the disk or the plan is too small, TrainingError if a training fails.
    """
    started = time.monotonic()
    with trainings_beside(rehearsal.run, rehearsal.is_kept) as trainings:
        resumed, whole = trainings.directory / "resumed", trainings.directory / "whole"
        killed_at, committed = _train_and_kill(rehearsal, trainings, resumed)
        last = min(committed + rehearsal.steps, RunDirectory(resumed).plan()[0].steps)
        _say(f"killed at step {killed_at}; going on from step {committed} to step {last}")
        trainings.run(rehearsal.command(resumed, last, rehearsal.steps))
        _say(f"training {counted(last, 'step')} in one go")
        _hand_over_evaluation(resumed, whole)
        trainings.run(rehearsal.command(whole, last, every=1))
        _say("comparing")
        difference = first_difference(whole, resumed, last)
        package = _package(trainings, f"{resumed}@{last}") if rehearsal.has_package else None
        return {
            "ok": difference is None and (package is None or package["problem"] is None),
            "steps": last,
            "resumed_from": committed,
            "killed_at": killed_at,
            "first_difference": cast(DifferenceRecord, asdict(difference)) if difference else None,
            "compared": compared(whole, last),
            "package": package,
            **_costs(rehearsal, whole, resumed, last),
            "reproducibility": rehearsal.loaded.recipe.train.reproducibility,
            "seconds": round(time.monotonic() - started, 1),
        }


def listing(facts: Outcome) -> str:
    """The same as text: the proof or the first difference, then the cost of a checkpoint."""
    checkpoint, smallest, package = facts["checkpoint"], facts["smallest_interval"], facts["package"]
    free = "on a free core" if checkpoint["has_free_core"] else "of the training's own cores"
    written = f"written, loaded back: {counted(len(package['checks']), 'check')}" if package else None
    packaged = package["problem"] or written if package else None
    rows = [
        _verdict(facts),
        (
            "compared",
            "{steps:,} steps, {rows:,} row losses, {tensors:,} tensors, {files:,} files".format(**facts["compared"]),
        ),
        *([("package", packaged)] if packaged else []),
        ("a step", f"{facts['step_seconds']:.3g} s"),
        (
            "checkpoint",
            f"{readable(checkpoint['bytes'])}; training waits {1000 * checkpoint['blocked_seconds']:.3g} ms for it, "
            f"it is durable after {checkpoint['save_seconds']:.3g} s, and computes {checkpoint['cpu_seconds']:.3g} s {free}",
        ),
        (
            "interval",
            f"{counted(smallest['steps'], 'step')} ({smallest['minutes']:.2g} minutes) keep checkpoints under {SHARE:.0%} of the time",
        ),
        ("recipe", f"a save every {' or '.join(facts['every'])} takes at most {facts['share']:.2%} of the time"),
        ("disk", f"{readable(facts['run_bytes'])} for the run; {readable(facts['free_bytes'])} free"),
    ]
    return "\n".join(f"{name:12}{text}" for name, text in rows)


def _verdict(facts: Outcome) -> tuple[str, str]:
    last, first, found = facts["steps"], facts["resumed_from"], facts["first_difference"]
    if not found:
        return (
            "exact",
            f"{last} steps in one go, and {last} steps killed at {facts['killed_at']} and resumed from {first}, are equal to the bit",
        )
    message = (
        f"step {found['step']}: {found['quantity']} is {found['uninterrupted']} in one go, and {found['resumed']} "
    )
    message += f"when killed at step {facts['killed_at']} and resumed from {first}. "
    if found["step"] <= first:
        message += "That was before the kill: this machine computes the same steps differently each time. "
    message += "Resume works, but not to the bit"
    return "not exact", message + ("; set train.reproducibility: exact" if facts["reproducibility"] == "fast" else "")


def _train_and_kill(rehearsal: Rehearsal, trainings: Trainings, run: Path) -> tuple[int, int]:
    """Kills a training in a step after its first commit; returns the last finished and the last committed step."""
    _say(f"training {counted(rehearsal.steps, 'step')}, to be killed")
    process = trainings.start(rehearsal.command(run, LONGEST * rehearsal.steps, rehearsal.steps))
    while not RunDirectory(run).is_run and process.poll() is None:
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        _refuse(rehearsal, RunDirectory(run).plan()[0], trainings.directory)
    while process.poll() is None and not _is_past_commit(*_progress(run)):
        time.sleep(POLL_SECONDS)
    trainings.refuse_failure()
    trainings.kill()
    if process.returncode == 0:
        raise TrainingError("the training reached its end before it could be killed", hint="use more --steps")
    newest, _ = Store(run).newest_sound()  # the kill may have come before the journal recorded it
    if newest is None:
        raise TrainingError("the training was killed, and has no sound checkpoint", hint="use another disk")
    return _progress(run)[0], newest.step


def _progress(run: Path) -> tuple[int, int]:
    """The last finished step and the last committed one."""
    records = journal.read(run)
    committed = [record["step"] for record in records if journal.is_event(record) and record["event"] == "committed"]
    return max(journal.steps(records), default=0), max(committed, default=0)


def _is_past_commit(finished: int, committed: int) -> bool:
    return 0 < committed < finished


def _refuse(rehearsal: Rehearsal, plan: Plan, directory: Path) -> None:
    """Raises RunError when plan or disk is too small, before the first checkpoint is written."""
    if plan.steps < 2 * rehearsal.steps:
        hint = (
            f"use --steps {plan.steps // 2}"
            if plan.steps >= 4
            else "a plan of so few steps needs no checkpoint but its last"
        )
        raise RunError(
            f"the plan has {counted(plan.steps, 'step')}, and a rehearsal needs {2 * rehearsal.steps}", hint=hint
        )
    checkpoint = disk.checkpoint_bytes(plan)
    package = memory.FLOAT * plan.total_parameters if rehearsal.has_package else 0
    needed, free = 2 * checkpoint + max(checkpoint, package), disk.free_bytes(directory)
    if needed > free:
        raise RunError(
            f"a rehearsal needs {readable(needed)}, and the disk has {readable(free)} left",
            where=str(directory),
            hint="free some space, or use --run on another disk",
        )


def _hand_over_evaluation(run: Path, other: Path) -> None:
    """Copies the held-out figures of step 0: they are the base's, so the second run need not compute them again."""
    other.mkdir()
    target = journal.Journal(other)
    for record in journal.read(run):
        if journal.is_event(record) and record["event"] == "evaluated" and record["step"] == 0:
            target.append(record)
    target.close()


def _package(trainings: Trainings, ref: str) -> PackageOutcome:
    """The report of `finetune package`, with all of its checks. The package is removed with its directory."""
    _say("packaging")
    started = time.monotonic()
    command = [sys.executable, "-m", "finetune", "package", ref, str(trainings.directory / "package"), "--json"]
    process = trainings.start(command, output="package.json")
    if process.wait() not in (0, 1):
        trainings.refuse_failure()
    said = json.loads((trainings.directory / "package.json").read_bytes())
    return {
        "problem": said["error"]["message"] if "error" in said else None,
        "checks": [f"{check['name']}: {check['message']}" for check in said.get("checks", ())],
        "seconds": round(time.monotonic() - started, 1),
    }


def _costs(rehearsal: Rehearsal, whole: Path, resumed: Path, last: int) -> Costs:
    """The times of a step and a checkpoint, the cadence they allow, and the disk space of the run."""
    plan, facts = RunDirectory(whole).plan()
    cost = measure([journal.read(run) for run in (whole, resumed)], facts)
    every, steps = cadence.saves_at_most(rehearsal.loaded.recipe), cost.smallest_interval()
    files = Store(whole).find(last).manifest.files
    return {
        "step_seconds": cost.step_seconds,
        "checkpoint": {
            "bytes": sum(file.bytes for file in files.values()),
            "blocked_seconds": cost.blocked_seconds,
            "save_seconds": cost.save_seconds,
            "cpu_seconds": cost.cpu_seconds,
            "has_free_core": cost.has_free_core,
        },
        "smallest_interval": {"steps": steps, "minutes": steps * cost.step_seconds / 60},
        "every": list(dict.fromkeys(map(str, every))),
        "share": cost.share(every),
        "run_bytes": disk.run_bytes(plan.model_copy(update={"recipe": rehearsal.loaded.recipe})),
        "free_bytes": disk.free_bytes(rehearsal.run),
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
