"""What it costs to find the billionth row of a run, in every kind of order, and to find an update of 32 rows there.

python scripts/bench/order.py [--rounds 500]
"""

import argparse
import time

import numpy as np
from figures import Goal, Part, Quantity

from finetune.plan.mixture import stretches_of
from finetune.plan.row_order import Order
from finetune.recipe.schema import Data

POSITION = 10**9
SIZES = (700_000_003, 250_000_000, 49_999_999, 1_000, 61)


def orders() -> dict[str, Order]:
    """Five sources of a billion rows together."""

    def made(order: str = "shuffled", temperature: float = 1.0, **keys: list[object]) -> Order:
        sources = [
            {"path": f"{number}.jsonl"} | {key: values[number] for key, values in keys.items()}
            for number in range(len(SIZES))
        ]
        data = Data.model_validate({"train": sources, "order": order, "temperature": temperature})
        return Order(0, 32, SIZES, stretches=stretches_of(data, SIZES), is_shuffled=order != "sequential")

    stages: list[object] = [[5, 3, 0], [1, 1, 1], [0.1, 2, 5], [1, 0, 1], [1, 1, 1]]
    return {
        "one source, shuffled": Order(0, 32, (2 * POSITION,)),
        "every row once": made(),
        "weights": Order(0, 32, SIZES, (0.5, 0.3, 0.1, 0.07, 0.03)),
        "epochs of each source": made(epochs=[1, 0.5, 2.5, 40, 1000]),
        "temperature": made(temperature=3.3),
        "sequential": made("sequential"),
        "sequential, by weights": made("sequential", weight=[5, 3, 1, 0.7, 0.3]),
        "curriculum": made("curriculum"),
        "curriculum of three stages": made("curriculum", weight=stages),
    }


def sought(rounds: int) -> Part:
    row, update = (Quantity(f"{what} at position 10^9", "ms") for what in ("one row", "an update of 32 rows"))
    draw = np.random.default_rng(0)
    for name, order in orders().items():
        for far in (POSITION + draw.integers(0, 10**6, rounds)).tolist():
            for quantity, count in ((row, 1), (update, 32)):
                started = time.perf_counter()
                order.examples_at(np.arange(far, far + count, dtype=np.int64))
                quantity.add(name, time.perf_counter() - started)
    goals = [Goal(f"a row, {name}", row.median(name), 0.001, "ms") for name in row.samples]
    return Part([row, update], goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    print(sought(parser.parse_args().rounds).show())


if __name__ == "__main__":
    main()
