"""Tasks of lm-evaluation-harness run on checkpoints, and their samples are kept."""

import json
from pathlib import Path

import pytest

from finetune.compare import harness
from finetune.compare.evaluate import shown
from finetune.errors import FinetuneError
from finetune.store import evaluations

pytestmark = pytest.mark.slow

TASK = """
task: toy_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["a", "b"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def task(tmp_path) -> Path:
    pytest.importorskip("lm_eval")
    rows = [{"question": question, "answer": number % 2} for number, question in enumerate(("the", "a row", "it has"))]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.format(data=tmp_path / "toy.jsonl"))
    return tmp_path / "toy.yaml"


def test_a_task_runs_on_a_checkpoint_once(recipe_file, train_once, task, tmp_path, monkeypatch) -> None:
    steps = {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128}
    run = train_once(recipe_file("harness", train=steps), tmp_path / "run")
    refs = [f"{run}@2", f"{run}@0"]
    made = harness.results(refs, [str(task)])
    assert [each["set"] for each in shown(made)] == ["toy_questions"] * 2
    for result in made:
        kept = result.evaluation
        assert kept.columns["acc"].mean() == kept.about["metrics"]["acc"] and len(kept.rows) == 3
        assert kept.about["measures"] == {"acc": {"per": "rows", "better": "higher"}}
    assert [each["is_comparable"] for each in shown(made)] == [True, True]
    assert evaluations.of_step(run, 2).is_dir()
    monkeypatch.setattr(harness, "_evaluated", None)
    again = shown(harness.results(refs, [str(task)]))
    assert again == [each | {"is_stored": True} for each in shown(made)]
    task.write_text(task.read_text() + "description: other\n")
    with pytest.raises(TypeError):
        harness.results(refs, [str(task)])


def test_an_unknown_task_is_named(tiny_base, task) -> None:
    with pytest.raises(FinetuneError, match="--lm-eval no_such_task: is no task of lm-eval"):
        harness.results([str(tiny_base)], ["no_such_task"])


def test_without_the_package_it_says_what_to_install(tiny_base, monkeypatch) -> None:
    def lacking(package: str) -> str:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(harness, "version", lacking)
    with pytest.raises(FinetuneError, match="pip install 'finetune\\[lm-eval\\]'"):
        harness.results([str(tiny_base)], ["arc_easy"])
