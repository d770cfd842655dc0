"""Simulates comparisons whose answer is known: how often `compare` names a false winner, how often its intervals hold, what it finds.

`python scripts/comparing.py [--simulations N] [--kinds 0 1 …]` prints a Markdown table. Models are sums of what rows have in
common and of noise of their own, with the long tails and unequal lengths of real rows.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from finetune.plan.statistics import choice
from finetune.plan.statistics.judge import Judgement, judge
from finetune.plan.statistics.sample import Sample, grouped

MODELS = 20
LOSS = 1.5  # nats a token, the true one of all models of an A/A comparison


@dataclass(frozen=True)
class World:
    """A kind of rows."""

    name: str
    rows: int
    draw: Callable[[np.random.Generator, int, np.ndarray], Sample]
    """(random numbers, rows, shift of each model) -> the results of the models."""
    truth: float = LOSS


def losses(random: np.random.Generator, rows: int, shifts: np.ndarray) -> Sample:
    """Losses a token of rows of unequal length; models differ from row to row by a noise with long tails (Student's t of 4 degrees)."""
    tokens = np.ceil(random.lognormal(3.5, 0.8, rows))
    shared = random.gamma(4, LOSS / 4, rows)
    noise = 0.08 * random.standard_t(4, (len(shifts), rows))
    return Sample(tokens * (shared + noise + shifts[:, None]), tokens)


def skewed(random: np.random.Generator, rows: int, shifts: np.ndarray) -> Sample:
    """The same with noise to one side in each model: a few rows that it has much worse."""
    tokens = np.ceil(random.lognormal(3.5, 0.8, rows))
    shared = random.gamma(4, LOSS / 4, rows)
    noise = 0.1 * (random.exponential(size=(len(shifts), rows)) - 1)
    return Sample(tokens * (shared + noise + shifts[:, None]), tokens)


def right_or_wrong(random: np.random.Generator, rows: int, shifts: np.ndarray) -> Sample:
    """Exact matches: a row has its difficulty, and two models answer one row in seven differently."""
    latent = random.normal(size=rows) + 0.3 * random.normal(size=(len(shifts), rows))
    return Sample((latent > shifts[:, None]).astype(float), np.ones(rows))


def clustered(random: np.random.Generator, rows: int, shifts: np.ndarray) -> Sample:
    """Rows in clusters of up to 9: models differ from cluster to cluster."""
    clusters = np.repeat(np.arange(rows), random.integers(1, 10, rows))[:rows]
    tokens = np.ceil(random.lognormal(3.5, 0.8, rows))
    shared = random.gamma(4, LOSS / 4, rows)
    count = int(clusters[-1]) + 1
    noise = 0.08 * random.normal(size=(len(shifts), count))[:, clusters] + 0.05 * random.normal(
        size=(len(shifts), rows)
    )
    return grouped(tokens * (shared + noise + shifts[:, None]), tokens, clusters)


WORLDS = (
    World("losses", 200, losses),
    World("losses, skewed", 200, skewed),
    World("exact match", 200, right_or_wrong, 0.5),
    World("losses in clusters", 400, clustered),
    World("losses", 50, losses),
    World("losses", 2000, losses),
)


@dataclass
class Tally:
    """What was seen in the simulations of a world, as shares of them."""

    false_winners: float = 0
    """Another model than the baseline is named the best, and all are equally good."""
    false_verdicts: float = 0
    """Any of the 19 is called better or worse."""
    values: float = 0
    """Intervals of values that hold the true one."""
    pairs: float = 0
    """Intervals of differences that hold 0."""
    chosen: float = 0
    """`interval_of_all` of the model with the lowest value holds 0."""
    last_leads: float = 0
    """The last model is among those that cannot be told from the best: what `@best` then names."""
    found: float = 0
    """A difference of the size that is found with 80 % is found, with one candidate."""
    found_of_all: float = 0
    """The same with 19 candidates."""


def simulate(world: World, simulations: int, seed: int = 0) -> Tally:
    tally = Tally()
    for number in range(simulations):
        random = np.random.default_rng([seed, world.rows, number])
        sample = world.draw(random, world.rows, np.zeros(MODELS))
        for name, value in _equal(sample, judge(sample), world.truth):
            setattr(tally, name, getattr(tally, name) + value / simulations)
    # as dear as all the rest, and a share that varies as much with four times fewer
    for number in range(found := max(1, simulations // 4)):
        random = np.random.default_rng([seed + 1, world.rows, number])
        for name, models in (("found", 2), ("found_of_all", MODELS)):
            setattr(tally, name, getattr(tally, name) + _is_found(world, random, models) / found)
    return tally


def _equal(sample: Sample, judged: Judgement, truth: float) -> Iterator[tuple[str, float]]:
    """What a comparison of equally good models got right."""
    yield "false_winners", judged.best(0, "lower") != 0
    yield "false_verdicts", any(pair.verdict in ("better", "worse") for pair in judged.pairs)
    yield "values", float(np.mean([low <= truth <= high for low, high in (f.interval for f in judged.figures)]))
    yield "pairs", float(np.mean([low <= 0 <= high for low, high in (pair.interval for pair in judged.pairs)]))
    low, high = min(judged.pairs, key=lambda pair: pair.difference).at_once
    yield "chosen", low <= 0 <= high
    yield "last_leads", MODELS - 1 in choice.leaders(sample)


def _is_found(world: World, random: np.random.Generator, models: int) -> bool:
    """Whether a known improvement of the last model is found, of the size that an earlier comparison of such rows predicts."""
    earlier = judge(world.draw(random, world.rows, np.zeros(models)))
    size = earlier.pairs[-1].smallest
    if (
        world.draw is right_or_wrong
    ):  # from a share to the shift of a threshold: the density of its normal, at the middle
        size *= np.sqrt(2 * np.pi * 1.09)
    shifts = np.zeros(models)
    shifts[-1] = -size
    judged = judge(world.draw(random, world.rows, shifts), 0, "higher" if world.draw is right_or_wrong else "lower")
    return judged.pairs[-1].verdict == "better"


HEAD = (
    "| kind of rows | rows | simulations | false winner | false verdict | value holds | difference holds | chosen one holds | last leads | found | found of 19 |\n"
    + "|---" * 11
    + "|"
)


def line(world: World, simulations: int) -> str:
    shares = " | ".join(f"{value:.1%}" for value in vars(simulate(world, simulations)).values())
    return f"| {world.name} | {world.rows:,} | {simulations:,} | {shares} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument(
        "--kinds", type=int, nargs="*", default=range(len(WORLDS)), help="numbers of kinds of rows, from 0"
    )
    given = parser.parse_args()
    print(HEAD, flush=True)
    for kind in given.kinds:
        print(line(WORLDS[kind], given.simulations), flush=True)
