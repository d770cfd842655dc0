"""Prints which chat rows each template of `tests/zoo` takes, which are refused, and which come out wrong."""

import argparse
import sys

from tests.zoo.catalog import ZOO
from tests.zoo.judge import Verdict
from tests.zoo.matrix import cells, counts
from tests.zoo.rows import MORE, ROWS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"templates to try; all of {len(ZOO)} without one")
    parser.add_argument("--why", action="store_true", help="says why each cell is refused")
    parser.add_argument("--more", action="store_true", help=f"tries {len(MORE)} further rows as well")
    parser.add_argument(
        "--drawn", type=int, default=0, metavar="N", help="tries N rows drawn at random as well; only counted"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in ZOO]:
        parser.error(f"no template is called {', '.join(unknown)}; there are: {', '.join(ZOO)}")
    kinds = [*ROWS, *(MORE if options.more else ())]
    found: dict[str, dict[str, Verdict]] = {}
    for name, kind, verdict in cells(options.names, kinds, range(options.drawn)):
        found.setdefault(name, {})[kind] = verdict
    for number, kind in enumerate(kinds, 1):
        print(f"{number:>4}  {kind}")
    print(
        "\n   .  ok     r  refused     R  refused, though it could be learnt     ?  refused without turn or field     W  WRONG\n"
    )
    print(" " * 24 + " ".join(f"{number:>2}" for number in range(1, len(kinds) + 1)))
    for name, row in found.items():
        print(f"{name:24}" + " ".join(f"{_sign(row[kind]):>2}" for kind in kinds))
    for name, row in found.items():
        for kind, verdict in row.items():
            if verdict.state == "WRONG" or options.why and verdict.state == "refused":
                print(f"\n{name} x {kind}: {verdict.state}\n    {verdict.why}")
    total = counts([verdict for row in found.values() for verdict in row.values()])
    print("\n" + ", ".join(f"{total[state]} {state}" for state in ("ok", "refused", "WRONG")), end="")
    print("; " + ", ".join(f"{count} {state}" for state, count in total.items() if "," in state))
    return 1 if total["WRONG"] else 0


def _sign(verdict: Verdict) -> str:
    if verdict.state != "refused":
        return {"ok": ".", "WRONG": "W"}[verdict.state]
    return ("R" if verdict.is_possible else "r") + ("" if verdict.is_named else "?")


if __name__ == "__main__":
    sys.exit(main())
