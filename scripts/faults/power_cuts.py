"""Cuts the power under a training, many times: copies its disk at a random instant, mounts the copy, and judges what is there.

    python scripts/faults/power_cuts.py --cuts 100 --resumes 5 --work /tmp/power_cuts        (as root)

The training writes into an ext4 in a loop-mounted image. The image is what has reached the disk: what the kernel still holds in
memory (unsynced files, names, ext4's open transaction) is not in it, and is lost, as in a power cut. At each cut every step that
was printed as committed before the copy began must be there, byte for byte, and nothing unsound in a checkpoint's place;
--resumes of the cuts are trained to the end and compared to the bit with a training left alone.

Is such a copy a state that a disk can be in? A copy takes milliseconds, and a write in that time could be seen without one that
went before it, across a flush, which no disk allows. So the training is stopped (SIGSTOP, until every thread sleeps or is inside
the kernel), and a copy counts only if the device has finished no write and has none under way between its begin and its end
(/sys/block/loopN/stat): then nothing changed while it was taken, and it is the disk of one instant, all finished writes on it and
no others. Others are thrown away and taken again, which also lets the kernel write back what it likes. Not covered: a disk that
loses or reorders finished writes in its own cache between two flushes; `ckpt-chaos` in its mode `unsynced` does a part of that.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from disk import CannotMount, make_image, mounted
from training import add_arguments, command, committed, differences, finish, is_saving, recipe_of, unsound, wait_until

KEEP = 1000
OVERRIDES = ["train.steps=400", "checkpoint.every=2 steps", f"checkpoint.keep.last={KEEP}"]
QUIET_SECONDS = 10  # until a stopped training's disk must have come to rest


@dataclass(frozen=True)
class Cut:
    """A copy of the disk, and what the training had printed before it was taken."""

    image: Path
    said: str
    is_saving: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--resumes", type=int, default=5, help="how many of the cuts to train to the end")
    parser.add_argument("--size", default="96M", help="of the image")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two cuts, at most")
    options = parser.parse_args()
    recipe, overrides, draw = recipe_of(options), [*OVERRIDES, *options.overrides], random.Random(options.seed)
    whole, started = options.work / "whole", time.monotonic()
    try:
        problems = finish(recipe, whole, overrides) if options.resumes else []
        resumed = set(draw.sample(range(options.cuts), options.resumes))
        for number, cut in enumerate(cuts(options, command(recipe, "{run}", overrides), draw)):
            steps = committed(cut.said)
            found = judged(cut, options.work / "cut", resume=number in resumed and (recipe, overrides, whole))
            problems += [f"cut {number + 1}: {problem}" for problem in found]
            place = "inside a save" if cut.is_saving else "between saves"
            print(
                f"cut {number + 1:3}: {len(steps):3} commits, {place}{', resumed' * (number in resumed)}"
                f": {'FAIL' if found else 'ok'}",
                flush=True,
            )
    except CannotMount as error:
        raise SystemExit(f"cannot mount an image: {error}") from error
    for problem in problems[:20]:
        print(problem)
    seconds = time.monotonic() - started
    print(
        f"{'FAIL' if problems else 'PASS'}: {options.cuts} cuts, {options.resumes} resumed, "
        f"{len(problems)} problems, {seconds:.0f} s"
    )
    sys.exit(1 if problems else 0)


def cuts(options: argparse.Namespace, words: list[str], draw: random.Random) -> Iterator[Cut]:
    """Cuts at random instants; a training that ends before the last one is followed by another on a new disk."""
    taken, life = 0, 0
    while taken < options.cuts:
        life += 1
        image = make_image(options.work / f"disk-{life}.img", options.size)
        log = options.work / f"training-{life}.log"
        with (
            mounted(image, options.work / "disk") as device,
            _training(words, options.work / "disk/run", log) as process,
        ):
            # the first cut of a life may come before its first commit
            wait_until(lambda: (options.work / "disk/run/checkpoints").is_dir(), process)
            while taken < options.cuts and process.poll() is None:
                time.sleep(draw.uniform(0, options.pause))
                if draw.random() < 0.5:  # most of the time passes between saves: half of the cuts wait for one
                    wait_until(lambda: is_saving(options.work / "disk/run"), process)
                if cut := take(process, device, image, log):
                    taken += 1
                    yield cut
        image.unlink()


@contextlib.contextmanager
def _training(words: list[str], run: Path, log: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as file:
        process = subprocess.Popen([word.replace("{run}", str(run)) for word in words], stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the training failed:\n{log.read_text()[-1000:]}")


def take(process: subprocess.Popen, device: str, image: Path, log: Path) -> Cut | None:
    """A copy of the disk of a stopped training; None when the training has ended."""
    copy = image.with_name("cut.img")
    process.send_signal(signal.SIGSTOP)
    try:
        if not wait_until(lambda: _is_stopped(process.pid), process):
            return None
        said, deadline = log.read_text(), time.monotonic() + QUIET_SECONDS
        saving = is_saving(image.with_name("disk") / "run")
        while time.monotonic() < deadline:
            before = _writes(device)
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            if before == _writes(device) and before[1] == 0:
                return Cut(copy, said, saving)
        raise SystemExit(f"the disk did not come to rest in {QUIET_SECONDS} s")
    finally:
        process.send_signal(signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    """Whether no thread runs a program's code: all are stopped, or wait inside the kernel for the disk."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # a thread has ended
        return False
    return bool(states) and set(states) <= set("TtD")


def _writes(device: str) -> tuple[int, int]:
    """How many writes and flushes a device has finished, and how many requests are under way (Documentation/block/stat.rst)."""
    fields = [int(field) for field in Path(f"/sys/block/{device}/stat").read_text().split()]
    return fields[4] + (fields[15] if len(fields) > 15 else 0), fields[8]


def judged(cut: Cut, directory: Path, resume: tuple[Path, list[str], Path] | bool) -> list[str]:
    """Everything that is wrong on a copied disk. Mounting it replays ext4's journal, as the first start after a power cut does."""
    with mounted(cut.image, directory):
        run = directory / "run"
        found = unsound(run, cut.said, KEEP)
        if resume and not found:
            recipe, overrides, whole = resume
            found = finish(recipe, run, overrides) or differences(whole, run)
    cut.image.unlink()
    return found


if __name__ == "__main__":
    main()
