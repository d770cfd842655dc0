"""The benchmark of loading runs, and gives its figures for each way to store a base. How much memory anything takes, no test asks."""

import json
import sys
from pathlib import Path

import pytest

from tests import forks

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "loading.py"


def test_the_benchmark_of_loading_gives_every_figure(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--only", "LoRA, bf16", "--json", str(tmp_path / "found.json")]
    done = forks.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found.keys() == {"bfloat16: LoRA, bf16", "float32: LoRA, bf16"}
    for figures in found.values():
        assert figures.keys() == {"seconds", "weights", "shard", "shards", "own", "mapped"}
        assert figures["shards"] > 4 and figures["weights"] > figures["shard"]
    assert done.stdout.count("shards above the weights") == 2
