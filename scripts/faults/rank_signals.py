"""Kills or stops one rank of a launched training again and again, and compares the end with that of a training left alone.

    python scripts/faults/rank_signals.py --signals SIGKILL --count 50 --strategies ddp,fsdp --work /tmp/ranks
    python scripts/faults/rank_signals.py --signals SIGSTOP --count 6 --strategies fsdp --work /tmp/stopped

`finetune launch --restarts` trains, and nobody else restarts anything. The rank and the moment are drawn; every fourth moment is in the
middle of a save. For each signal it prints how long the last of the other ranks lived on, and what they said of it. Exits 1 unless the
others ended in time and named the rank, every restart went on from the last commit, and the two runs end with equal bytes and records.
"""

import argparse
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from sigkill import last_step
from training import add_arguments, command, differences, is_saving, ranks_of, recipe_of, unsound, wait_until

from finetune.store.checkpoints.store import Store
from finetune.store.run import journal

STEPS_BETWEEN = 4  # signals, so that each finds steps after its restart
DEAD_SECONDS = 10.0  # within which a dead rank ends all others
SILENCE_SECONDS = 3  # after which a stopped one is given up here
KEEP = 3


class Signal(NamedTuple):
    """One that was sent."""

    rank: int
    is_inside: bool
    """Whether a save was under way."""
    has_met: bool
    """Whether the ranks had met: before, none can know of another."""
    seconds: float
    """Until the last of the other ranks had ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--signals", default="SIGKILL,SIGSTOP", help="names, one after the other")
    parser.add_argument("--count", type=int, default=50, help="signals in each training")
    parser.add_argument("--strategies", default="ddp,fsdp")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    recipe, problems, count = recipe_of(options), [], 0
    for strategy in options.strategies.split(","):
        whole = options.work / f"{strategy}-whole"
        subprocess.run(launch(recipe, whole, strategy, options), check=True, capture_output=True)
        for name in options.signals.split(","):
            found = disturb(recipe, whole, strategy, signal.Signals[name], options)
            problems += [f"{strategy}, {name}: {problem}" for problem in found]
            count += options.count
    print("\n".join(problems))
    print(f"{'FAIL' if problems else 'PASS'}: {count} signals, {len(problems)} problems")
    sys.exit(1 if problems else 0)


def launch(recipe: Path, run: Path, strategy: str, options: argparse.Namespace) -> list[str]:
    """The training that is disturbed, with as many restarts as it can need."""
    sets = [
        f"train.strategy={strategy}",
        f"train.steps={STEPS_BETWEEN * options.count + 4}",
        "checkpoint.every=3 steps",
    ]
    sets += [f"checkpoint.keep.last={KEEP}", f"train.lost_rank_seconds={SILENCE_SECONDS}", *options.overrides]
    starter = ["launch", "--nproc-per-node", str(options.ranks), "--restarts", str(2 * options.count)]
    return command(recipe, run, sets, starter)


def disturb(recipe: Path, whole: Path, strategy: str, number: signal.Signals, options: argparse.Namespace) -> list[str]:
    """All that is wrong with a training whose ranks got the signal."""
    run, chance = options.work / f"{strategy}-{number.name}", random.Random(f"{options.seed}{strategy}{number}")
    log = run.with_suffix(".log")
    with log.open("w") as file:
        launcher = subprocess.Popen(launch(recipe, run, strategy, options), stderr=file)
    sent, problems, seen, ended = [], [], 0, False
    try:
        for turn in range(options.count):
            at = STEPS_BETWEEN * turn + chance.randint(1, STEPS_BETWEEN)
            if not wait_until(
                lambda at=at: last_step(run) >= at and len(ranks_of(launcher)) == options.ranks, launcher
            ):
                return [
                    f"signal {turn + 1}: the training ended before, with {launcher.poll()}:\n{log.read_text()[-2000:]}"
                ]
            said = log.stat().st_size
            sent.append(once(run, launcher, number, seen, turn % 4 == 3, chance))
            seen = starts(run)
            text = log.read_text()[said:]
            problems += [f"signal {turn + 1}: {each}" for each in wrong_ending(sent[-1], number, text)]
            problems += [f"signal {turn + 1}: {each}" for each in unsound(run, log.read_text(), KEEP)]
        ended = launcher.wait(timeout=600) == 0
    finally:
        launcher.kill()
        launcher.wait()
    show(strategy, number, sent)
    problems += [] if ended else [f"the launcher ended with {launcher.returncode}:\n{log.read_text()[-2000:]}"]
    problems += ["a traceback"] if "Traceback" in log.read_text() else []
    return problems + resumed_elsewhere(run) + differences(whole, run)


def once(
    run: Path, launcher: subprocess.Popen, number: signal.Signals, seen: int, wants_save: bool, chance: random.Random
) -> Signal:
    """Signals a rank, and waits for the end of the others; a rank that was stopped is killed by the launcher. `seen`: the starts of the
    training before this one."""
    if number == signal.SIGSTOP:  # nothing but torch's own limit of half an hour ends a start with a hung rank
        wait_until(lambda: starts(run) > seen, launcher)
    if wants_save:
        wait_until(lambda: is_saving(run), launcher)
    else:
        time.sleep(chance.random() / 20)
    ranks = ranks_of(launcher)
    victim = chance.choice(sorted(ranks))
    is_inside, has_met = is_saving(run), starts(run) > seen
    ranks[victim].send_signal(number)
    began = time.monotonic()
    gone, _ = psutil.wait_procs([each for rank, each in ranks.items() if rank != victim], timeout=200)
    seconds = time.monotonic() - began
    psutil.wait_procs([ranks[victim]], timeout=200)
    wait_until(lambda: not any(each in ranks.values() for each in ranks_of(launcher).values()), launcher)
    return Signal(victim, is_inside, has_met, seconds)


def starts(run: Path) -> int:
    """How often the training has begun to train: all ranks had met."""
    return (
        sum(record.get("event") == "started" for record in journal.read(run)) if (run / "journal.jsonl").exists() else 0
    )


def wrong_ending(sent: Signal, number: signal.Signals, said: str) -> list[str]:
    """Whether the others ended in time, and named the rank."""
    is_dead = number == signal.SIGKILL
    limit, what = (DEAD_SECONDS, "has ended") if is_dead else (SILENCE_SECONDS + DEAD_SECONDS, "gave no sign of life")
    found = [f"the others ended after {sent.seconds:.1f} seconds"] if sent.seconds > limit else []
    if sent.has_met and not re.search(rf"lost another rank: rank {sent.rank} on \S+ {what}", said):
        found.append(f"no message names rank {sent.rank}:\n{said[-1000:]}")
    return found


def resumed_elsewhere(run: Path) -> list[str]:
    """Attempts that did not begin at the newest commit."""
    found, newest = [], 0
    for record in journal.read(run):
        if record.get("event") == "committed":
            newest = max(newest, record["step"])
        # a kill may come between the rename and its line in the journal
        if record.get("event") == "started" and record["step"] < newest:
            found.append(f"an attempt began at step {record['step']}, and step {newest} was committed")
    return found + ([] if Store(run).newest_sound()[0] else ["no sound checkpoint"])


def show(strategy: str, number: signal.Signals, sent: list[Signal]) -> None:
    seconds = [each.seconds for each in sent]
    ranks = ", ".join(
        f"rank {rank} {sum(each.rank == rank for each in sent)}" for rank in sorted({s.rank for s in sent})
    )
    inside, before = sum(each.is_inside for each in sent), sum(not each.has_met for each in sent)
    print(f"{strategy}: {len(sent)} times {number.name} ({ranks}; {inside} inside a save, {before} during a start)")
    print(
        f"  the last other rank ended after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (longest)"
    )


if __name__ == "__main__":
    main()
