"""Times `finetune compare` of 20 stored evaluations with 10,000 rows each, in a fresh process: what a second call costs.

    python scripts/bench/comparing.py [--refs 20] [--rows 10000] [--rounds 5]

Checkpoints are manifests without weights, and results are made up; everything that `compare` reads is there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from finetune.data.sources.open import open_source
from finetune.plan.facts import Facts
from finetune.plan.pinned import Counts, PinnedBase, PinnedSource
from finetune.plan.plan import ROW_RULES, Plan
from finetune.plan.split import digest
from finetune.recipe.schema import Recipe
from finetune.store import evaluated, evaluations
from finetune.store.checkpoints.manifest import FileRecord, Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.evaluations import Evaluation
from finetune.store.run.directory import RunDirectory

STEPS = 500  # in the journal
RUN = """
import sys
from finetune.cli import main
try: main()
finally: print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)), file=sys.stderr)
"""


def run_of(work: Path, refs: int, rows: int) -> Path:
    """A run with a checkpoint and an evaluation for each ref."""
    data, run = work / "rows.jsonl", work / "run"
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    data.write_text("".join(json.dumps({"messages": turns, "number": number}) + "\n" for number in range(rows)))
    source = {"path": str(data)}
    recipe = Recipe.model_validate(
        {
            "base": {"checkpoint": "owner/name"},
            "task": {"name": "chat", "max_length": 64},
            "data": {"train": [source], "holdout": [source]},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": STEPS, "batch_size": 8},
        }
    )
    opened = open_source(recipe.data.train[0], form="conversation")
    pin = PinnedSource(name=str(data), revision=None, fingerprint=opened.fingerprint, rows=rows)
    counts = dict.fromkeys(("rows", "examples", "tokens", "supervised_tokens", "longest"), rows)
    counted = Counts(**counts, cut_rows=0, cut_tokens=0, left_out_rows=0)
    random = np.random.default_rng(0)
    contents = random.integers(1, 2**63, rows, dtype=np.uint64)
    plan = Plan(
        recipe=recipe,
        base=PinnedBase(kind="hub", revision="0" * 40, digest=None),
        train=(pin,),
        holdout=(pin,),
        encoding="blake3:0",
        counts=counted,
        holdout_counts=counted,
        sizes=(rows,),
        steps=STEPS,
        warmup_steps=0,
        total_parameters=1,
        trainable_parameters=1,
        row_rules=ROW_RULES,
        held_out=digest(contents),
        stages=(),
    )
    run.mkdir()
    RunDirectory(run).plan_file.write_bytes(plan.dump(Facts(run="r", device="cpu", versions={})))
    _journal(RunDirectory(run).journal)
    tokens, of_rows = np.ceil(random.lognormal(3.5, 0.8, rows)).astype(np.int64), random.gamma(4, 0.4, rows)
    store = Store(run)
    for number in range(1, refs + 1):
        step = number * STEPS // refs
        files = {"model.safetensors": FileRecord(0, f"blake3:{step:064x}")}
        attempt = store.begin(step, "a")
        manifest = Manifest(run="r", attempt="a", step=step, parent=None, plan_id=plan.plan_id, files=files)
        attempt.files.update(files)
        store.commit(attempt, manifest)
        losses = tokens * (of_rows - 0.002 * number + 0.1 * random.standard_t(4, rows))
        evaluations.write(
            evaluations.of_step(run, step),
            Evaluation(
                {
                    "schema": evaluations.SCHEMA,
                    "ref": f"run@{step}",
                    "model": evaluated.weights(files, evaluated.base(recipe.base, plan.base)),
                    "data": evaluated.rows(plan, plan.held_out),
                    "set": evaluations.HELD_OUT,
                    "task": "chat",
                    "settings": evaluated.settings(plan, plan),
                    "measures": {"loss": {"per": "tokens", "better": "lower"}},
                    "metrics": {"loss": float(losses.sum() / tokens.sum())},
                    "created": str(number),
                    "seconds": 0.0,
                },
                contents,
                np.arange(rows),
                tokens,
                {"loss": losses},
            ),
        )
    return run


def _journal(path: Path) -> None:
    figures = {"loss": 3.3, "grad_norm": 1.8, "learning_rate": 0.001, "tokens": 1701, "supervised_tokens": 165}
    about = {"seconds": 9.1, "await_seconds": 0.0, "attempt": "a", "time": "2026-11-22T14:18:38.303+00:00"}
    lines = [json.dumps({"kind": "step", "step": step, **figures, **about}) for step in range(1, STEPS + 1)]
    path.write_text("\n".join(lines) + "\n")


def measure(refs: int, rows: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        run = run_of(Path(work), refs, rows)
        names = [f"{run}@{number * STEPS // refs}" for number in range(1, refs + 1)]
        seconds, used = [], []
        for _ in range(rounds):
            before, started = os.times(), time.perf_counter()
            command = [sys.executable, "-c", RUN, "compare", *names]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - started)
            used.append(sum(os.times()[2:4]) - sum(before[2:4]))
        print(
            f"{refs} refs, {rows:,} rows: {statistics.median(seconds):.2f} s, {statistics.median(used):.2f} CPU seconds"
        )
        print(f"heavy modules: {result.stderr.splitlines()[-1]}")
        print(result.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    measure(**vars(parser.parse_args()))
