"""The short forms of the benchmarks of orders and of corpora: every kind and every contestant runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def test_every_kind_of_order_is_sought_at_its_billionth_row(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import order

    found = order.sought(2)
    assert len(found.goals) == 9 and all(len(samples) == 2 for samples in found.quantities[0].samples.values())


@pytest.mark.slow
def test_a_corpus_is_encoded_by_every_contestant_and_after_a_kill(tmp_path):
    work, file = tmp_path / "work", tmp_path / "report.json"
    command = [sys.executable, BENCH / "corpora.py", "--work", work, "--json", file, "--tiny"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    assert not list(work.iterdir()), "what was measured is removed"
    seconds, cpu, memory = (
        set(quantity["contestants"]) for quantity in json.loads(file.read_bytes())["parts"]["corpora"]["quantities"]
    )
    assert seconds == cpu | {"datasets: of these, map alone"} and cpu == memory == {
        "finetune",
        "datasets: load and map",
    }
