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
from pathlib import Path

from training import add_arguments, command, differences, is_saving, recipe_of, wait_until

from finetune.store.run import journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    whole, killed = options.work / "whole", options.work / "killed"
    recipe = recipe_of(options)
    train = command(recipe, killed, options.overrides)
    subprocess.run(command(recipe, whole, options.overrides), check=True)
    steps = len(journal.steps(journal.read(whole)))
    chance = random.Random(options.seed)
    inside = [kill_once(train, killed, number, options.kills, steps, chance) for number in range(options.kills)]
    subprocess.run(train, check=True)
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


if __name__ == "__main__":
    main()
