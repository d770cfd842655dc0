"""The commands are functions of the package: looked up late, typed, and callable whatever was imported before."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.cli import functions
from finetune.errors import FinetuneError
from finetune.recipe.load import load as load_recipe
from finetune.store import places

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_nothing_of_it() -> None:
    code = "import sys, finetune; print(*(name for name in sys.modules if name.startswith('finetune.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", finetune.VERBS)
def test_a_verb_can_be_called_whatever_was_imported(name) -> None:
    importlib.import_module("finetune.plan.facts")
    importlib.import_module("finetune.package.bounds")
    importlib.import_module("finetune.compare.paired")
    assert callable(getattr(finetune, name))
    stub = ast.parse((ROOT / "finetune/__init__.pyi").read_text())
    typed = {each.asname for node in stub.body if isinstance(node, ast.ImportFrom) for each in node.names}
    assert name in typed
    with pytest.raises(AttributeError, match="has no attribute 'no_such_verb'"):
        finetune.no_such_verb  # noqa: B018


@pytest.mark.slow
def test_a_recipe_is_planned_trained_and_evaluated_in_python(recipe_file, tmp_path) -> None:
    steps = {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128}
    recipe = recipe_file("functions", train=steps)
    assert finetune.plan(recipe, run=tmp_path / "run")["steps"] == 2
    run = finetune.train(recipe, tmp_path / "run", ["train.seed=3"], is_quiet=True)
    assert run == tmp_path / "run"
    [result] = finetune.evaluate(f"{run}@last")
    assert result["is_stored"] and result["metrics"]["loss"] > 0
    compared = finetune.compare([f"{run}@0", f"{run}@last"])
    assert compared["results"][1]["value"] == pytest.approx(result["metrics"]["loss"]) and len(compared["pairs"]) == 1
    with pytest.raises(finetune.FinetuneError, match="was started with another recipe"):
        finetune.train(recipe, run)
    assert finetune.FinetuneError is FinetuneError


def test_a_function_knows_nothing_of_the_runs_that_earlier_calls_have_read(recipe_file, tmp_path, monkeypatch) -> None:
    places.found("data/train.jsonl", str(tmp_path), "the data")
    known = []

    def load(*arguments: object) -> object:
        known.append(places.moved())
        places.found("data/other.jsonl", str(tmp_path), "the data")
        return load_recipe(*arguments)

    monkeypatch.setattr(functions, "load", load)
    finetune.plan(recipe_file(), run=tmp_path / "run")
    assert known == [{}]
    assert places.moved() == {"data/train.jsonl": str(tmp_path)}
