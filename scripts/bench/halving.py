"""Does halving find the winner of the grid, and at which cost? Trains 16 configurations both ways and compares.

    python scripts/bench/halving.py --work /tmp/halving            # a random Llama on docstrings of the standard library: minutes
    python scripts/bench/halving.py recipes/mine.yaml --work DIR   # your own recipe, with the space of --set

Both sweeps have the same trials, row by row and bit by bit. Prints the winners with their 95 % intervals and the share of tokens, and
exits 1 unless the winner of halving is the grid's or lies in its interval, at 40 % of the tokens or less.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPACE = [
    "optimizer.learning_rate=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]",
    "optimizer.weight_decay=[0.0, 0.1]",
]
STEPS, ROWS, LENGTH = 160, 8, 128
MOST_TOKENS = 0.4  # of the grid's
NORMAL = 1.96  # standard errors on each side of 95 %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe; without one a tiny one is made")
    parser.add_argument("--work", type=Path, required=True, help="a directory for data and sweeps")
    parser.add_argument("--set", dest="space", action="append", help="the space, as for `finetune sweep`")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument(
        "--rungs", default="", help="the steps at which halving compares; by default those of the sweep"
    )
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    recipe = options.recipe or docstrings(options.work)
    shared = [
        "sweep",
        str(recipe),
        *(f"--set={each}" for each in options.space or SPACE),
        f"--workers={options.workers}",
    ]
    halved = [f"--halving={options.factor}", *([f"--rungs={options.rungs}"] if options.rungs else [])]
    grid = swept(*shared, f"--sweep={options.work / 'grid'}")
    halving = swept(*shared, *halved, f"--sweep={options.work / 'halving'}")
    sys.exit(0 if told(grid, halving) else 1)


def swept(*words: str) -> dict:
    """The answer of a sweep."""
    command = [sys.executable, "-m", "finetune", *words, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def told(grid: dict, halving: dict) -> bool:
    """Prints both winners; whether halving kept its promise."""
    (whole, winner), (spared, found) = (
        (sum(t["tokens"] for t in s["trials"]), s["trials"][0]) for s in (grid, halving)
    )
    for name, trial in (("grid", winner), ("halving", found)):
        low, high = interval(trial)
        settings = " ".join(f"{key}={value}" for key, value in trial["settings"].items())
        print(f"{name:8}{trial['metrics']['loss']:.4f}  [{low:.4f}, {high:.4f}]  {settings}")
    place = [trial["settings"] for trial in grid["trials"]].index(found["settings"]) + 1
    low, high = interval(winner)
    is_within = low <= found["metrics"]["loss"] <= high
    print(
        f"halving: place {place} of {len(grid['trials'])} in the grid, {'within' if is_within else 'outside'} its interval"
    )
    print(f"tokens: {spared:,} of {whole:,}, {spared / whole:.1%}")
    return is_within and spared <= MOST_TOKENS * whole


def interval(trial: dict) -> tuple[float, float]:
    """Of the held-out loss, by the spread of its rows."""
    loss, margin = trial["metrics"]["loss"], NORMAL * trial["metrics"]["loss_stderr"]
    return loss - margin, loss + margin


def docstrings(work: Path) -> Path:
    """A recipe that trains all weights of a random Llama on functions and docstrings of the standard library."""
    from training import Shape, _random_base  # they import torch

    data, path = work.absolute() / "data", work / "docstrings.yaml"
    if not data.exists():
        subprocess.run([sys.executable, ROOT / "scripts/stdlib_docstrings.py", data], check=True)
        for name in ("train", "holdout"):
            rows = [json.loads(line)["messages"] for line in (data / f"{name}.jsonl").read_text().splitlines()]
            texts = [{"text": "\n".join(message["content"] for message in reversed(row))} for row in rows]
            (data / f"{name}-texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    sections = {
        "base": {"checkpoint": _random_base(work, Shape(layers=2, hidden=64, intermediate=192, vocabulary=257))},
        "task": {"name": "text", "max_length": LENGTH},
        "data": {name: [{"path": str(data / f"{name}-texts.jsonl")}] for name in ("train", "holdout")},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": STEPS, "batch_size": ROWS, "precision": "fp32"},
        "guard": {"spike": "ignore"},
    }
    path.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in sections.items()))
    return path


if __name__ == "__main__":
    main()
