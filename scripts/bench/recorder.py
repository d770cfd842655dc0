"""What the flight recorder costs: a training that records every step beside the same one that does not, in turns of ten steps.

    python scripts/bench/recorder.py --work DIR [--rounds 12]

Recorded are the journal's line, the loss of every row and the gradient norm of every group of modules; the last needs a sum by group in place
of one over all, which both have. The model has 41.7 M parameters, and a save each twenty steps writes the columns.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from figures import Goal, Part, Quantity
from training import MEDIUM, Training, Work, opened, write_recipe

TURN = 10  # steps


def measured(training: Training, rounds: int) -> Part:
    recorded, bare = "recorded", "not recorded"
    seconds = Quantity("a step, from its begin to the next one's", "ms")
    inside = Quantity("of these, in the recorder", "ms")
    for turn in range(-1, rounds):
        for name in (recorded, bare) if turn % 2 else (bare, recorded):
            started, spent = time.perf_counter(), 0.0
            for _ in range(TURN):
                report = next(training.reports)
                if name == recorded:
                    before = time.perf_counter()
                    training.recorder.step(report)
                    spent += time.perf_counter() - before
            if turn >= 0:
                seconds.add(name, (time.perf_counter() - started) / TURN)
                if name == recorded:
                    inside.add(name, spent / TURN)
    share = inside.median(recorded) / seconds.median(recorded)
    goals = [
        Goal("recorder's share of a step", share, 0.005, "%"),
        Goal(
            "a recorded step, beyond one that is not", seconds.median(recorded) / seconds.median(bare) - 1, 0.005, "%"
        ),
    ]
    return Part([seconds, inside], goals)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new directory")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True)
    recipe = write_recipe(options.work / "recipe.yaml", MEDIUM, Work(8, 64))
    with opened(recipe, options.work / "run") as training:
        print(measured(training, options.rounds).show())
    return 0


if __name__ == "__main__":
    sys.exit(main())
