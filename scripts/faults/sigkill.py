"""Kills a training with SIGKILL again and again, resumes it by the same command, and compares it with one left alone.

    python scripts/faults/sigkill.py recipes/smollm2-135m/quickstart.yaml --kills 20 --work /tmp/sigkill

Most kills come a random few steps after the last commit, every fourth in the middle of a save (while an attempt is being
written). Prints one line a kill and a verdict; exits 1 unless the two runs end with equal bytes and equal records.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file

from finetune import journal

DEADLINE_SECONDS = 600  # of one start of the training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    whole, killed = options.work / "whole", options.work / "killed"

    def command(run: Path) -> list[str]:
        overrides = [word for override in options.overrides for word in ("--set", override)]
        return [sys.executable, "-m", "finetune", "train", options.recipe, "--run", str(run), "--quiet", *overrides]

    subprocess.run(command(whole), check=True)
    steps = len(journal.steps(journal.read(whole)))
    chance = random.Random(options.seed)
    inside = [
        kill_once(command(killed), killed, number, options.kills, steps, chance) for number in range(options.kills)
    ]
    subprocess.run(command(killed), check=True)
    problems = differences(whole, killed)
    print(f"{options.kills} kills over {steps} steps, {sum(inside)} of them inside a save")
    print(
        "\n".join(problems) or "equal: every tensor of the last checkpoint, every step's last record, every row's loss"
    )
    sys.exit(1 if problems else 0)


def kill_once(command: list[str], run: Path, number: int, kills: int, steps: int, chance: random.Random) -> bool:
    """Starts the training, kills it at a moment that leaves room for the other kills; returns whether that was inside a save."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wants_save = number % 4 == 3
    target = min(steps - 1, round((number + chance.random()) * steps / kills))
    reached = wait_until(lambda: last_step(run) >= target, process)
    if wants_save and reached:
        reached = wait_until(lambda: is_saving(run), process)
    process.kill()
    process.wait()
    if not reached and process.returncode != -signal.SIGKILL:
        raise SystemExit(f"kill {number + 1}: the training ended by itself with {process.returncode}")
    is_inside = is_saving(run)
    print(
        f"kill {number + 1:2}: at step {last_step(run)}, {'inside a save' if is_inside else 'between saves'}",
        flush=True,
    )
    return is_inside


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def last_step(run: Path) -> int:
    """The newest step in the journal, read from its end: it is polled."""
    path = run / "journal.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return max(journal.steps(filter(None, map(record, file.read().splitlines()))), default=0)


def record(line: bytes) -> dict | None:
    try:
        return journal.json.loads(line)
    except ValueError:  # the first line of the window, and one being written
        return None


def is_saving(run: Path) -> bool:
    attempts = run / "attempts"
    return attempts.is_dir() and any(attempts.iterdir())


def differences(run: Path, other: Path) -> list[str]:
    """Everything in which two finished runs differ, times aside."""
    last = sorted(path.name for path in (run / "checkpoints").iterdir())[-1]
    found = []
    for path in sorted((run / "checkpoints" / last).glob("*.safetensors")):
        tensors, others = load_file(path), load_file(other / "checkpoints" / last / path.name)
        if tensors.keys() != others.keys():
            found.append(f"{path.name}: other tensors")
        found += [f"{path.name}: {name}" for name in tensors if tensors[name].tobytes() != others[name].tobytes()]
    steps, other_steps = journal.steps(journal.read(run)), journal.steps(journal.read(other))
    if steps.keys() != other_steps.keys():
        found.append("the journals have other steps")
    for step in sorted(steps.keys() & other_steps.keys()):
        if quantity := journal.difference(steps[step], other_steps[step]):
            found.append(f"step {step}: {quantity}")
        if journal.read_rows(run, step) != journal.read_rows(other, step):
            found.append(f"step {step}: row losses")
    return found


if __name__ == "__main__":
    main()
