"""Lets `ckpt-chaos`, a crash tester for anybody's trainer, crash a training at its file operations and judge what a resume makes of it.

    python scripts/faults/chaos.py --points 40 --work /tmp/chaos

Modes: `before` and `torn` end the process at an operation, or after half of a file; `term` sends SIGTERM there; `unsynced` first takes
back what was not synced. One process, and two with the crash in either, which each write their rows (fsdp) after every step: the
second one has no other files. It arms the main process of each rank only; what a child or
a thread without Python writes is for `syscalls.py`. Exits 1 unless every verdict is PASS: the resume works, begins at the newest
checkpoint that was complete, and ends equal to the bit (weights, moments, every step's record and every row's loss).
"""

import argparse
import collections
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from training import add_arguments, command, recipe_of

OVERRIDES = ["train.steps=12", "checkpoint.every=4 steps", "checkpoint.keep.last=1000"]
FAIL_ON = "HARD_FAIL,SILENT_DIVERGENCE,CONTROL_FAIL,LOST_WORK"
NOTHING_WRITTEN = "made no file changes"
SHARDED = ["train.strategy=fsdp", "checkpoint.every=1 steps"]
GROUPS = {"1": (1, 0), "2:0": (2, 0), "2:1": (2, 1)}  # processes, and which of them crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--points", type=int, default=40, help="crashes of each group")
    parser.add_argument("--modes", default="before,torn,term,unsynced")
    parser.add_argument(
        "--groups", default=",".join(GROUPS), help="of 1 (one process), 2:0 and 2:1 (the first or second of two)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="crash points at a time")
    options = parser.parse_args()
    if importlib.util.find_spec("ckpt_chaos") is None:
        raise SystemExit("ckpt-chaos is not installed: pip install ckpt-chaos")
    recipe = recipe_of(options)
    counts, is_good = collections.Counter(), True
    for group in options.groups.split(","):
        of_ranks = SHARDED if GROUPS[group][0] > 1 else []
        train = command(recipe, "{out}", [*OVERRIDES, *of_ranks, *options.overrides])
        work = options.work / group.replace(":", "-")
        is_good &= crash(train, work, options, *GROUPS[group])
        for row in rows(work):
            counts[group, row["verdict"]] += 1
            # a training may have done its last step when SIGTERM comes; all other crashes must have taken place
            is_good &= row["crashed"] or "[term]" in row["label"] or "control" in row["label"]
    for (group, verdict), count in sorted(counts.items()):
        print(f"{group:4} {verdict:18} {count:4}")
    print(f"{'PASS' if is_good else 'FAIL'}: {counts.total()} runs, controls included")
    sys.exit(0 if is_good else 1)


def crash(train: list[str], work: Path, options: argparse.Namespace, ranks: int, crash_rank: int) -> bool:
    """One matrix of crashes, whose table ckpt-chaos prints; whether all of them passed."""
    digest = [sys.executable, str(Path(__file__).with_name("training.py")), "--digest", "{out}"]
    words = [sys.executable, "-m", "ckpt_chaos", "run", "--work", work, "--jobs", options.jobs]
    words += ["--max-points", options.points, "--modes", options.modes, "--grace", 20, "--timeout", 300]
    words += ["--ranks", ranks, "--crash-rank", crash_rank, "--fail-on", FAIL_ON]
    # a manifest names its attempt, its metrics and its time, so its size is not always the same
    words += ["--checkpoint-glob", "{out}/checkpoints/step-*", "--ckpt-ignore-size"]
    words += ["--step-regex", r"resumed from step (\d+)", "--result-cmd", shlex.join(digest), "--", *train]
    print(f"{ranks} process(es), the crash in number {crash_rank}", flush=True)
    # ckpt-chaos 0.1.8 gives the crash to this rank alone, and arms the one of this variable: without it only rank 0 would crash
    environment = os.environ | {"CKPT_CHAOS_CRASH_RANK": str(crash_rank)}
    result = subprocess.run([str(word) for word in words], stderr=subprocess.PIPE, text=True, env=environment)
    if NOTHING_WRITTEN in result.stderr:
        print("writes no file of the run: there is nothing to crash at")
        return True
    print(result.stderr, end="", flush=True)
    return result.returncode == 0


def rows(work: Path) -> list[dict]:
    """What ckpt-chaos has written down of each run, with its verdict."""
    from ckpt_chaos.runner import rejudge

    return [{"label": row.label, "crashed": row.crashed, "verdict": row.verdict} for row in rejudge(work)]


if __name__ == "__main__":
    main()
