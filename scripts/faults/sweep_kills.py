"""Kills the processes of a sweep with SIGKILL at random moments, starts them again, and compares all with a sweep left alone.

    python scripts/faults/sweep_kills.py --kills 50 --work /tmp/sweep_kills

Two processes share the sweep: `finetune sweep RECIPE` with two trainings at a time, and `finetune sweep DIR --worker` with one. A kill
hits one of them, or a training. Prints a line a kill and a verdict; exits 1 unless the tables are equal, every trial has equal bytes,
and no step ran twice that was committed before.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
from training import add_arguments, differences, recipe_of

from finetune.compare.sweep import directory
from finetune.store.run import journal

LONG = [
    "--set=optimizer.learning_rate=[1e-4,1e-3,3e-3,1e-2]",
    "--set=adapter.rank=[2,4]",
    "--halving=2",
    "--rungs=15,30",
]
SHORT = ["--set=optimizer.learning_rate=[1e-4,1e-3,1e-2]", "--halving=2", "--rungs=8", "--set=train.steps=30"]
SHARE_OF_TRAININGS = 0.25  # of the kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--short", action="store_true", help="a sweep of three trials")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds between two kills, at most")
    options = parser.parse_args()
    recipe, whole, killed = recipe_of(options), options.work / "whole", options.work / "killed"
    space = SHORT if options.short else LONG
    first = ["sweep", str(recipe), *space, *(f"--set={each}" for each in options.overrides)]
    subprocess.run(finetune(*first, f"--sweep={whole}"), check=True, stdout=subprocess.DEVNULL)
    killer = Killer(first, killed, random.Random(options.seed))
    for number in range(options.kills):
        print(f"kill {number + 1:2}: {killer.kill(options.longest)}", flush=True)
    killer.finish()
    problems = [*killer.problems, *(problem for path in killer.done for problem in compared(whole, path))]
    told = (
        f"PASS: {options.kills} kills in {len(killer.done)} sweeps; the same table, and the same bytes of every trial"
    )
    print("\n".join(problems) or told)
    sys.exit(1 if problems else 0)


def finetune(*words: str) -> list[str]:
    return [sys.executable, "-m", "finetune", *words]


class Killer:
    """The processes of a sweep, which start again when they are dead; a sweep that is done makes room for the same once more."""

    def __init__(self, first: list[str], path: Path, chance: random.Random):
        self.done: list[Path] = []
        self.problems: list[str] = []
        self._first, self._path, self._chance = first, path, chance
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def kill(self, longest_seconds: float) -> str:
        """Waits for a random time, kills one process, and says which."""
        until = time.monotonic() + self._chance.uniform(0.0, longest_seconds)
        while time.monotonic() < until:
            self._look()
            time.sleep(0.02)
        self._look()
        # More trainings would be killed three times without a commit, which a sweep takes for a lack of memory.
        if self._chance.random() < SHARE_OF_TRAININGS and (trainings := self._trainings()):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._chance.choice(trainings).kill()
            return "a training"
        name = self._chance.choice([*self._processes])
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        return name

    def finish(self) -> None:
        """Returns when the sweep under way is done."""
        count = len(self.done)
        while len(self.done) == count and not self.problems:
            self._look()
            time.sleep(0.02)

    def _look(self) -> None:
        """Starts what is not there. Of a sweep that is done, its table is the last that is written."""
        for name, process in [*self._processes.items()]:
            if process.poll() is None:
                continue
            del self._processes[name]
            if process.returncode:
                self.problems.append(f"{name} ended with {process.returncode}: {self._log(name).read_text()[-600:]}")
        if (self._path / "table.json").exists() and not self._processes:
            self.done.append(self._path.with_name(f"{self._path.name}-{len(self.done)}"))
            self._path.rename(self.done[-1])
        helper = ["sweep", str(self._path), "--worker"]
        commands = {"the sweep": [*self._first, f"--sweep={self._path}", "--workers=2"], "its helper": helper}
        is_over = (self._path / "table.json").exists()
        for name, command in commands.items():
            if name not in self._processes and not is_over and (name == "the sweep" or directory.exists(self._path)):
                with self._log(name).open("wb") as log:
                    self._processes[name] = subprocess.Popen(finetune(*command), stdout=subprocess.DEVNULL, stderr=log)

    def _log(self, name: str) -> Path:
        return self._path.with_name(f"{name.replace(' ', '-')}.log")

    def _trainings(self) -> list[psutil.Process]:
        found = []
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(process.pid).children()
        return found


def compared(whole: Path, killed: Path) -> list[str]:
    """Everything in which a sweep differs from one that was left alone, and steps that ran again though they were committed."""
    tables = [table_of(path) for path in (whole, killed)]
    found = [] if tables[0] == tables[1] else [f"{killed}: other tables: {tables[0]} against {tables[1]}"]
    for run in sorted((whole / "trials").iterdir()):
        other = killed / "trials" / run.name
        found += [f"{other}: {problem}" for problem in (*differences(run, other), *repeated(other))]
    return found


def table_of(sweep: Path) -> str:
    """The table without the sweep's own place, which its renames have changed."""
    table = json.loads((sweep / "table.json").read_bytes())
    place = table.pop("sweep")
    return json.dumps(table).replace(place, "")


def repeated(run: Path) -> list[str]:
    """Attempts that began before the newest commit that was known by then."""
    found, newest = [], 0
    for record in journal.read(run):
        if record.get("event") == "committed":
            newest = max(newest, record["step"])
        elif record.get("event") == "started" and record["step"] < newest:
            found.append(f"step {newest} was committed, and training began again after step {record['step']}")
    return found


if __name__ == "__main__":
    main()
