"""`compare` of refs: what is stored is compared without a model, and what is not is evaluated first."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.errors import DataError
from finetune.store.run.directory import RunDirectory

EVALUATED = {"evaluate": {"every": "4 steps"}, "checkpoint": {"every": "4 steps", "keep": {"last": 5}}}


@pytest.fixture
def runs(recipe_file, train_once, tmp_path, monkeypatch):
    """Two runs of one recipe with other learning rates, each with steps 4, 8 and 10."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_file(**EVALUATED)
    train_once(recipe, tmp_path / "slow", "optimizer.learning_rate=1e-5")
    train_once(recipe, tmp_path / "fast")
    return tmp_path


def run(*arguments: object) -> str:
    """What a command prints, in this process."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_runs_are_compared_by_what_training_stored(runs):
    found = json.loads(run("compare", "slow@10", "fast@10", "fast@0", "--json"))
    assert (found["metric"], found["rows"], found["set"], found["baseline"]) == ("loss", 8, "held-out", "slow@10")
    assert [pair["verdict"] for pair in found["pairs"]] == ["better", "worse"]
    assert found["best"] == "fast@10"
    assert found["pairs"][0]["recipe"] == [{"key": "optimizer.learning_rate", "a": 1e-5, "b": 0.01}]
    slow, fast, base = found["results"]
    assert slow["tokens"] == fast["tokens"] > 0 and fast["seconds"] > 0 and fast["bytes"] > 1000
    assert (base["tokens"], base["bytes"]) == (0, None)
    assert found["pairs"][0]["changed"][0]["text"].startswith("user: ")
    shown = run("compare", "slow@10", "fast@10")
    assert "best: fast@10" in shown and "recipe of fast@10: optimizer.learning_rate: 1e-05 -> 0.01" in shown
    assert run("compare", "slow", "--every-checkpoint", "--csv").count("\n") == 4


@pytest.mark.slow
def test_what_is_stored_is_compared_without_torch(runs):
    program = (
        "import sys; sys.argv = ['finetune', 'compare', 'slow@10', 'fast@10', 'fast@8', 'fast@0']\n"
        "from finetune.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'peft', 'datasets', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert "best: fast@10" in result.stdout


@pytest.mark.slow
def test_a_model_of_no_run_is_evaluated_on_the_rows_of_the_first_run(runs, tiny_base):
    found = json.loads(run("compare", "slow@10", tiny_base, "slow@0", "--json"))
    assert found["rows"] == 8
    assert found["results"][1]["value"] == pytest.approx(found["results"][2]["value"], rel=1e-5)


@pytest.mark.slow
def test_rows_of_a_file_can_be_clustered_and_a_set_has_to_be_there(runs):
    rows = runs / "more.jsonl"
    lines = [
        {
            "messages": [{"role": "user", "content": f"what {n}"}, {"role": "assistant", "content": "it was"}],
            "by": n % 7,
        }
        for n in range(20)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("compare", "slow@10", "fast@10", "--data", rows)
    found = json.loads(run(*asked, "--cluster", "by", "--json"))
    assert (found["set"], found["rows"], found["clusters"]) == ("more.jsonl", 20, 7)
    with pytest.raises(DataError, match="has no rows named `other`"):
        run(*asked, "--rows", "other")


@pytest.mark.slow
def test_the_plan_says_what_the_rows_can_show(runs, recipe_file):
    recipe = recipe_file(**EVALUATED)
    assert RunDirectory(runs / "fast").is_run
    known = json.loads(run("plan", recipe, "--run", runs / "new", "--json"))["detectable"]
    assert known["known_from"] == "the rows of fast@8 and fast@10" and 0 < known["low"] == known["high"]
    elsewhere = run("plan", recipe, "--run", runs / "elsewhere" / "new")
    assert "8 held-out rows can usually show a difference of " in elsewhere
