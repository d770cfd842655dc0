"""What a long run costs beside a short one, side by side: the keep rules of a save, the columns of a save, and reading a journal.

    python scripts/bench/history.py [--kept 200] [--steps 200000] [--rounds 10]

Nothing is trained: manifests of 600 tensors, columns and journals are made up in a temporary directory.
"""

import argparse
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from finetune.recipe.schema import Keep
from finetune.store.checkpoints import pruning
from finetune.store.checkpoints.manifest import FileRecord, Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal, row_losses, scan
from finetune.store.tensors import TensorRecord

TENSORS, BATCH = 600, 32
FEW_KEPT, FEW_STEPS = 2, 1_000


def store_of(run: Path, kept: int) -> Store:
    """A run whose checkpoints have only manifests."""
    records = tuple(TensorRecord(f"model.layers.{n}.weight", "F32", (0,), f"xxh3-128:{n:032x}") for n in range(TENSORS))
    files = {"model.safetensors": FileRecord(0, "blake3:" + "0" * 64, records)}
    for step in range(1, kept + 1):
        path = run / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        made = Manifest(run="r", attempt="a", step=step, parent=None, plan_id="p", files=files)
        (path / "manifest.json").write_bytes(made.to_bytes())
    return Store(run)


def journal_of(run: Path, steps: int) -> Path:
    run.mkdir()
    figures = {"loss": 3.3368173772638494, "grad_norm": 1.8603101968765259, "learning_rate": 0.001, "tokens": 1701}
    about = {"supervised_tokens": 165, "seconds": 9.1, "await_seconds": 0.0, "attempt": "785c964b"}
    with (run / "journal.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {"kind": "step", "step": step, **figures, **about, "time": "2026-11-22T14:18:38.303+00:00"}
            file.write(f"{json.dumps(record)}\n")
    return run


def save_columns(run: Path, step: int) -> None:
    rows = [row_losses.RowLoss(step, row, row, 1 / (row + step), 100) for row in range(BATCH)]
    row_losses.Columns(rows, [row_losses.ModuleNorms(step, {f"layers.{n}": 1 / step for n in range(30)})]).write(
        run, "a"
    )


def in_turns(rounds: int, few: Callable[[], object], many: Callable[[], object]) -> tuple[float, float]:
    """Medians of the seconds that two things take."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for taken, work in zip(seconds, (few, many), strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def show(what: str, few: float, many: float, unit: str = "ms", scale: float = 1e3) -> None:
    print(f"{what:58}{few * scale:>12.3f}{many * scale:>12.3f} {unit:3}{many / few:>8.1f} x", flush=True)


def measure(work: Path, kept: int, steps: int, rounds: int) -> None:
    rule = Keep(last=1, every="1 step")
    stores = [store_of(work / f"kept-{count}", count) for count in (FEW_KEPT, kept)]
    print(f"{'':58}{f'{FEW_KEPT} kept':>12}{f'{kept} kept':>12}")
    due = [lambda store=store: pruning.due(store, rule, {}, ()) for store in stores]
    for each in due:
        each()
    show("keep rules of a save, manifests known", *in_turns(rounds, *due))
    fresh = [lambda store=store: pruning.due(Store(store.run), rule, {}, ()) for store in stores]
    show("the same, all manifests read (as every save did)", *in_turns(rounds, *fresh))
    runs = [work / "few-saves", work / "many-saves"]
    for run, count in zip(runs, (FEW_KEPT, kept), strict=True):
        for step in range(1, count + 1):
            save_columns(run, step)
    after = [iter(range(count + 1, count + 1 + rounds)) for count in (FEW_KEPT, kept)]
    saves = [lambda run=run, step=step: save_columns(run, next(step)) for run, step in zip(runs, after, strict=True)]
    show("columns of a save", *in_turns(rounds, *saves))
    show("files in rows/", *(len(list((run / "rows").iterdir())) for run in runs), unit="", scale=1)
    journals = [journal_of(work / f"journal-{count}", count) for count in (FEW_STEPS, steps)]
    print(f"\n{'':58}{f'{FEW_STEPS:,} st.':>12}{f'{steps:,} st.':>12}")
    show("scan of the journal", *in_turns(3, *(lambda run=run: scan.read(run) for run in journals)))
    show(
        "all of it read (as replay, bisect and log did)",
        *in_turns(1, *(lambda run=run: journal.read(run) for run in journals)),
    )
    for what, read in (("scan", scan.read), ("all records", journal.read)):
        peaks = []
        for run in journals:
            tracemalloc.start()
            read(run)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        show(f"memory of it: {what}", *peaks, unit="MB", scale=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measure(Path(work), options.kept, options.steps, options.rounds)


if __name__ == "__main__":
    main()
