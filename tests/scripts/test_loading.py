"""The benchmark of loading gives its figures for each way to store a base. How much memory anything takes, no test asks."""

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def loading(monkeypatch):
    """The script; other scripts have modules of the same names as the ones it imports."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = {name: sys.modules.pop(name, None) for name in ("loading", "training")}
    yield importlib.import_module("loading")
    for name, module in before.items():
        del sys.modules[name]
        if module:
            sys.modules[name] = module


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_benchmark_of_loading_gives_every_figure(loading, stored, tmp_path: Path, capsys) -> None:
    adapter, train = loading.CASES["LoRA, bf16"]
    recipe = loading.write_recipe(tmp_path / "recipe.yaml", loading.SHAPES["tiny"], loading.WORK, adapter)
    loading.set_base(recipe, str(loading.sharded(recipe, stored)), train)
    found = loading.measured(recipe)
    assert found.keys() == {"seconds", "weights", "shard", "shards", "own", "mapped"}
    assert found["shards"] > 4 and found["weights"] > found["shard"]
    loading._show(stored, found)
    assert "shards above the weights" in capsys.readouterr().out
