"""The part of `syscalls.py` that is done to a training: strace is attached once it has committed, and hits one call of its saves.

Which call of a real training is the Nth is not the same twice: threads race, and strace counts for each thread on its own. So
nothing is enumerated. N is drawn, strace's log says which file the fault has hit (and whether it hit one of the run at all), and
the same is asked whatever that was: every step that was printed as committed is there and sound, nothing unsound is in a
checkpoint's place, and the run ends, by itself or resumed, equal to the bit to one left alone. Besides, for a save's own files:
after EIO one clear error and exit code 1; after ENOSPC and EDQUOT the save is skipped, loudly, and the training goes on. With two
ranks that each write their rows, the second one's errors cost a save as well, with its message.
"""

import argparse
import errno
import os
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from syscalls import CALLS, injection, print_table
from training import ALONE, TWO_RANKS, command, committed, differences, finish, ranks_of, recipe_of, unsound, wait_until

KEEP = 3
SPACE = ("ENOSPC", "EDQUOT")
OVERRIDES = ["train.steps=120", "checkpoint.every=4 steps", f"checkpoint.keep.last={KEEP}"]


@dataclass(frozen=True)
class Trial:
    """One training, its fault, and how it ended."""

    run: Path
    fault: str
    name: str
    exit_code: int
    said: str
    hit: str | None
    """The file of the run that the fault has hit; None where it hit another one, or none."""


def run(options: argparse.Namespace, faults: list[str]) -> None:
    """Prints the table and exits."""
    recipe, draw, victim = recipe_of(options), random.Random(options.seed), options.victim
    starter = ALONE if victim is None else TWO_RANKS
    overrides = [*OVERRIDES, *([] if victim is None else ["train.strategy=fsdp"]), *options.overrides]
    whole = options.work / "whole"
    if found := finish(recipe, whole, overrides, starter):
        raise SystemExit(found[0])
    rehearsal = options.work / "rehearsal"
    calls = rehearse(command(recipe, rehearsal, overrides, starter), rehearsal, victim)
    done, problems, elsewhere = [], [], 0
    for number in range(options.trials):
        fault = faults[number % len(faults)]
        name = draw.choice(sorted(calls))
        directory = options.work / f"run-{number}"
        words = command(recipe, directory, overrides, starter)
        trial = train(words, directory, fault, name, draw.randint(1, calls[name]), victim)
        found = _wrong_ending(trial, victim) + unsound(trial.run, trial.said, KEEP)
        found += finish(recipe, trial.run, overrides, starter) if trial.exit_code else []
        found += [] if found else differences(whole, trial.run)
        problems += [f"run-{number}: {fault} at {name} of {trial.hit}: {problem}" for problem in found]
        elsewhere += trial.hit is None
        done.append((fault, name))
        print(f"run-{number}: {fault:8} {name:9} {trial.hit or 'elsewhere':40} exit code {trial.exit_code}", flush=True)
    print(f"{elsewhere} of them hit no file of the run")
    print_table(done, problems)


def rehearse(words: list[str], directory: Path, victim: int | None) -> dict[str, int]:
    """How often, in the busiest thread, two saves make each kind of call on files of the run. Without openat: each step looks at its memory
    in /proc, so the main thread would meet the fault there, and no disk does that."""
    _, said, trace = _attached(words, directory, ["-e", f"trace={','.join(CALLS)}"], victim)
    commits = len(committed(said))
    counts: dict[str, dict[str, int]] = {}
    for thread, name, arguments in re.findall(r"^(\d+) +(\w+)\((.*)", trace, re.MULTILINE):
        if str(directory) in arguments and name != "openat":
            threads = counts.setdefault(name, {})
            threads[thread] = threads.get(thread, 0) + 1
    return {name: max(2, 2 * max(threads.values()) // commits) for name, threads in counts.items()}


def train(words: list[str], directory: Path, fault: str, name: str, number: int, victim: int | None) -> Trial:
    exit_code, said, trace = _attached(words, directory, injection(fault, name, number), victim)
    lines = [line for line in trace.splitlines() if "(INJECTED)" in line]
    if exit_code in (-9, 137):  # the call that was not made is the last one of its thread
        lines = trace.splitlines()
    files = re.findall(rf"{re.escape(str(directory.absolute()))}/([^\"<>]+)", "\n".join(lines))
    return Trial(directory, fault, name, exit_code, said, files[-1] if files else None)


def _attached(words: list[str], directory: Path, strace: list[str], victim: int | None) -> tuple[int, str, str]:
    """Runs a training with strace on all its threads and children, or on those of a rank, from its first commit on: exit code, what it
    said, the trace."""
    log, trace = directory.with_suffix(".log"), directory.with_suffix(".trace")
    with log.open("w") as file:
        process = subprocess.Popen(words, stderr=file)
    if not wait_until(lambda: "committed step" in log.read_text(), process):
        raise SystemExit(f"no commit before the training ended:\n{log.read_text()}")
    pid = process.pid if victim is None else ranks_of(process)[victim].pid
    targets = [word for pid in _tree(pid) for word in ("-p", str(pid))]
    tracer = subprocess.Popen(["strace", "-f", "-y", "-o", str(trace), *strace, *targets], stderr=subprocess.DEVNULL)
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
        tracer.wait(timeout=60)
    return code, log.read_text(), trace.read_text()


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [each for child in children for each in _tree(int(child))]


def _wrong_ending(trial: Trial, victim: int | None) -> list[str]:
    """Whether the training said what it must, where the fault has hit a file of a save."""
    found = ["a traceback"] if "Traceback" in trial.said else []
    if trial.hit is None or not trial.hit.startswith(("attempts/", "checkpoints/")):
        return found
    if victim and trial.fault != "SIGKILL":
        message = f"rank {victim}: cannot write: {os.strerror(getattr(errno, trial.fault)).lower()}"
        is_said = f"skipped: {message}" in trial.said and trial.exit_code == 0
        # or it was the last save, which no other makes up for
        is_said |= f"the last step is not committed: {message}" in trial.said and trial.exit_code == 1
        return found if is_said else [*found, f"exit code {trial.exit_code}: {trial.said[-300:]}"]
    if trial.fault in SPACE and not (trial.exit_code == 0 and re.search(r"save of step \d+ skipped", trial.said)):
        found.append(f"the save was not skipped; exit code {trial.exit_code}: {trial.said[-300:]}")
    if trial.fault == "EIO" and not (trial.exit_code == 1 and "input/output error" in trial.said):
        found.append(f"no clear error; exit code {trial.exit_code}: {trial.said[-300:]}")
    return found
