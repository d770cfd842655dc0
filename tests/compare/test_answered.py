"""Metrics of what a model answers to the rows of a set: asked as in training, kept, and taken again."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import finetune
from finetune.cli import cli
from finetune.compare import answered
from finetune.compare.evaluate import evaluate
from finetune.errors import FinetuneError, RecipeError
from finetune.recipe.load import load
from finetune.store import evaluations
from tests.conftest import chat_row

COUNT = "import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['expected'].split()))"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_sections):
    folder = tmp_path_factory.mktemp("answered")
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in range(100, 104)))

    def recipe(name: str = "answered", metrics: object = ("exact_match",), **sections: object) -> Path:
        asked = {"rows": [{"path": str(file)}], "metrics": [*metrics], "max_new_tokens": 4}
        steps = {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128}
        written = {**tiny_sections, "train": steps, "evaluate": {"sets": {"asked": asked}}} | sections
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return recipe


@pytest.fixture
def run(recipe, train_once, tmp_path) -> Path:
    return train_once(recipe(), tmp_path / "run")


def test_metrics_of_a_set_are_computed_once(run, monkeypatch) -> None:
    held_out, asked = evaluate([f"{run}@2"])
    assert "exact_match" not in held_out["metrics"] and 0 <= asked["metrics"]["exact_match"] <= 1
    assert asked["metrics"]["loss"] and not asked["is_stored"]
    monkeypatch.setattr(answered, "_answers", None)
    assert evaluate([f"{run}@2"])[1] == asked | {"is_stored": True}
    kept = [each for each in evaluations.read_all(evaluations.of_step(run, 2)) if each.answers is not None]
    assert [len(each.answers) for each in kept] == [4] and kept[0].about["measures"] == {
        "exact_match": {"per": "rows", "better": "higher"}
    }
    assert np.array_equal(kept[0].columns["exact_match"].mean(), asked["metrics"]["exact_match"])


def test_another_metric_needs_no_model_where_the_answers_are_kept(run, recipe, train, monkeypatch) -> None:
    evaluate([f"{run}@2"])
    program = {"name": "words", "program": [sys.executable, "-c", COUNT]}
    train(recipe("more", ["exact_match", {"name": "regex", "pattern": "."}, program]), run)
    monkeypatch.setattr(answered, "_answers", None)
    metrics = evaluate([f"{run}@2"])[1]["metrics"]
    words = [len(chat_row(number)["messages"][1]["content"].split()) for number in range(100, 104)]
    assert metrics["words"] == sum(words) / 4 and {"exact_match", "regex"} <= metrics.keys()


def test_metrics_are_asked_for_by_name_of_any_rows(run, tmp_path, monkeypatch) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in range(110, 113)))
    short = ["--metric", "json", "--max-new-tokens", "4", "--json"]

    def asked(*arguments: str) -> list[dict]:
        result = CliRunner().invoke(cli, ["evaluate", f"{run}@2", *arguments], catch_exceptions=False)
        return json.loads(result.stdout)["results"]

    (found,) = asked("--data", str(file), *short)
    assert found["metrics"]["json"] == 0 and found["metrics"]["rows"] == 3 and not found["is_stored"]
    held_out, of_recipe = asked(*short)
    assert "json" in held_out["metrics"] and {"json", "exact_match"} <= of_recipe["metrics"].keys()
    monkeypatch.setattr(answered, "_answers", None)
    assert asked("--data", str(file), *short)[0] == found | {"is_stored": True}
    assert asked("--data", str(file), "--metric", "exact_match", *short)[0]["metrics"].keys() >= {"json", "exact_match"}
    assert "json" not in asked("--data", str(file), "--json")[0]["metrics"]
    refused = CliRunner().invoke(cli, ["evaluate", f"{run}@2", "--metric", "bleu"])
    assert refused.exit_code == 2 and "'bleu' is not one of" in refused.stderr


def test_functions_of_the_api_get_each_row_with_its_answer(run) -> None:
    given = []

    def length(row) -> float:
        given.append(row)
        return len(row["answer"])

    results = finetune.evaluate(f"{run}@2", metrics=[length], max_new_tokens=4)
    assert [each["metrics"]["length"] for each in results] == [
        pytest.approx(np.mean([len(row["answer"]) for row in some])) for some in (given[:8], given[8:])
    ]
    asked = given[8]
    row = chat_row(100)["messages"]
    assert asked["expected"] == row[1]["content"] and row[0]["content"] in asked["prompt"]
    assert asked["prompt"].endswith("<|im_start|>assistant\n") and asked["tokens"] > 0
    assert "exact_match" in results[1]["metrics"]


def test_a_program_that_fails_ends_an_evaluation_with_what_it_said(run, recipe, train) -> None:
    train(recipe("broken", [{"name": "mine", "program": [sys.executable, "-c", "import nothing_like_it"]}]), run)
    with pytest.raises(FinetuneError, match="No module named 'nothing_like_it'"):
        evaluate([f"{run}@2"])


@pytest.mark.parametrize("task", [{"name": "text"}, {"name": "chat", "learn": "all"}])
def test_metrics_need_prompts(recipe, task) -> None:
    with pytest.raises(RecipeError, match="evaluate.sets.asked.metrics: need rows with a prompt that is not learnt"):
        load(recipe("none", task=task))
