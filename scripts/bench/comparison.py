"""From runs to figures: the speed, memory and start of each contestant in a cell, the goals, and whether all computed the same.

Ratios are taken within a round, whose contestants ran next to one another, and their median is held against the goal.
"""

from collections.abc import Callable, Iterable
from statistics import median

from cells import Cell, parse
from figures import OURS, Goal

DROPPED = 2  # steps before the steady state: memory is touched for the first time, moments are made, kernels are chosen
CHECKED = 20  # losses that are compared
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}  # relative; of bf16 each product is rounded to 1 in 256
REFERENCE = "bare-padded"

Run = dict
Key = tuple[str, str]  # a cell and malloc's settings


def tokens_per_second(run: Run) -> float:
    """Of non-padding tokens in the steady state; from the end of a step to the end of another, whatever happens between them."""
    return sum(run["tokens"][DROPPED:]) / (run["ends"][-1] - run["ends"][DROPPED - 1])


def step_speeds(run: Run) -> list[float]:
    ends = run["ends"]
    seconds = [end - before for before, end in zip(ends, ends[1:], strict=False)]
    return [tokens / taken for tokens, taken in zip(run["tokens"][1:], seconds, strict=True)][DROPPED - 1 :]


def peak_bytes(run: Run) -> float:
    """Resident at most; the buffers that saves are staged in are counted separately."""
    return run["peak_bytes"] - run["staged_bytes"]


def first_step_seconds(run: Run) -> float:
    """From the start of the process to the end of its first update."""
    return run["ends"][0] - run["started"]


def mfu(cell: Cell, run: Run, peak: float) -> float:
    """The share of the machine's matrix-product peak (GFLOP/s, best of a session) that a run's products reach."""
    return tokens_per_second(run) * cell.flops_of_token / 1e9 / peak


def keys_of(runs: Iterable[Run]) -> list[Key]:
    """The cells that were measured, in order."""
    return list(dict.fromkeys((run["cell"], run["malloc"]) for run in runs))


def by_contestant(runs: Iterable[Run], key: Key) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        if (run["cell"], run["malloc"]) == key:
            found.setdefault(run["contestant"], []).append(run)
    return found


def fastest_bare(contestants: dict[str, list[Run]]) -> str | None:
    bare = [name for name in contestants if name.startswith("bare")]
    return max(bare, key=lambda name: median(map(tokens_per_second, contestants[name])), default=None)


def ratios(figure: Callable[[Run], float], ours: list[Run], other: list[Run]) -> list[float]:
    """Ours over another's, round by round."""
    others = {run["round"]: figure(run) for run in other}
    return [figure(run) / others[run["round"]] for run in ours if run["round"] in others]


def goals_of(contestants: dict[str, list[Run]], cell: Cell) -> list[tuple[Goal, list[float]]]:
    """The promised ratios of a cell, as far as both sides were measured, each with the ratios of its rounds."""
    bare = fastest_bare(contestants)
    packed = 1.3 if cell.precision == "fp32" else 1.4
    promised = [
        ("tokens/s, ours / fastest bare loop", tokens_per_second, bare, 0.97, True),
        ("tokens/s, ours / Trainer", tokens_per_second, "trainer", 1.6, True),
        ("tokens/s, ours / SFTTrainer packed", tokens_per_second, "sft-packed", packed, True),
        ("peak memory, ours / Trainer", peak_bytes, "trainer", 0.65, False),
        ("peak memory, ours / SFTTrainer packed", peak_bytes, "sft-packed", 0.9, False),
        ("start to first step, ours / fastest bare loop", first_step_seconds, bare, 1.15, False),
    ]
    goals = []
    for name, figure, other, limit, is_floor in promised:
        found = ratios(figure, contestants.get(OURS, []), contestants.get(other, []))
        if found:
            goals.append((Goal(name, median(found), limit, "x", is_floor), found))
    return goals


def loss_differences(contestants: dict[str, list[Run]]) -> dict[str, float]:
    """The largest relative difference of the first losses from the padded bare loop's, over all runs of each contestant."""
    if REFERENCE not in contestants:
        return {}
    right = contestants[REFERENCE][0]["losses"][:CHECKED]
    return {
        name: max(_difference(run["losses"][:CHECKED], right) for run in runs) for name, runs in contestants.items()
    }


def _difference(losses: list[float], right: list[float]) -> float:
    return max(abs(loss - expected) / expected for loss, expected in zip(losses, right, strict=False))


def disagreeing(runs: list[Run]) -> list[str]:
    """A line for every contestant that does not compute the plain loop's loss."""
    lines = []
    for key in keys_of(runs):
        tolerance = TOLERANCES[parse(key[0]).precision]
        for name, difference in loss_differences(by_contestant(runs, key)).items():
            if not difference <= tolerance:  # nan as well
                lines.append(f"{key[0]}: losses of {name} differ by {difference:.2g}, more than {tolerance:g}")
    return lines
