"""Trains every way to share a training among ranks with every kind of training, on the CPU, and prints which cells are right.

`python scripts/ranks.py` takes about five CPU minutes; words after it choose cells by their names, as `-k` of pytest does. A cell is right
if its losses and rows are those of one process, and a second training has the same bits. `tests/stories/test_rank_matrix.py` does it.
"""

import os
import sys
from itertools import product
from pathlib import Path

import pytest

os.environ["FINETUNE_LONG_TESTS"] = "1"  # all cells: read when the tests are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model is slower on several threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests/stories/test_rank_matrix.py"


class Outcomes:
    """What pytest finds, by the name of a test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.found[report.nodeid.partition("::")[2]] = report.outcome


def main() -> int:
    outcomes = Outcomes()
    chosen = ["-k", " or ".join(sys.argv[1:])] if sys.argv[1:] else []
    code = pytest.main(["-v", "--tb=short", "-p", "no:xdist", f"--rootdir={ROOT}", *chosen, str(TESTS)], [outcomes])
    print("\n".join(["", *_table(outcomes.found)]))
    return code


def _table(found: dict[str, str]) -> list[str]:
    """Lines of Markdown: a row for each kind of training, a column for each strategy and number of ranks."""
    from tests.stories.sharing import METHODS, SHARED_BASES
    from tests.stories.test_rank_matrix import WORLDS, Cell

    cells = {name.partition("[")[2].rstrip("]"): outcome for name, outcome in found.items() if "[" in name}
    lines = [f"| training | {' | '.join(WORLDS)} |", "|---" * (len(WORLDS) + 1) + "|"]
    for method, base, packing in product(METHODS, SHARED_BASES, ("packed", "padded")):
        row = [cells.get("-".join(Cell(world, method, base, packing)), "") for world in WORLDS]
        lines.append(f"| {method}, {base}, {packing} | {' | '.join(row)} |")
    return lines


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
