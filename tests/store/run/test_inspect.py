"""What `log` shows of a run: checkpoints, incidents and branches, in the order in which they came."""

import pytest

from finetune.debug.branch import Choices, branch
from finetune.debug.replay import replay
from finetune.store.run.inspect import log, tree

pytestmark = pytest.mark.slow
TRAIN = {"steps": 12, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}


def test_a_run_is_drawn_with_its_branches_and_incidents(recipe_file, train, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = train(recipe_file(train=TRAIN, checkpoint={"every": "4 steps", "keep": {"last": 9}}), tmp_path / "runs/a")
    replay(path, 6, 6, is_materialized=True)
    lower = branch("runs/a@4", None, Choices(("optimizer.learning_rate=0.001",)))
    branch(f"{lower}@8", None, Choices(("train.seed=1",)), until=9)
    from pathlib import Path

    facts = log(Path("runs/a"))
    assert [row["step"] for row in facts["checkpoints"]] == [4, 6, 8, 12]
    assert [row["pinned"] for row in facts["checkpoints"]] == [True, True, False, False]
    (child,) = facts["branches"]
    assert (child["run"], child["parent"]["ref"], child["branches"][0]["run"]) == ("runs/a-4", "a@4", "runs/a-4-8")
    lines = tree(facts).splitlines()
    assert lines[1] == "runs/a  (12 of 12 steps)"
    order = [
        next(place for place, line in enumerate(lines) if text in line)
        for text in ("a@4 ", "a-4  (", "a-4-8  (", "a@6 ", "a@12 ")
    ]
    assert order == sorted(order)
    assert "from a@4: optimizer.learning_rate: 0.01 -> 0.001" in "\n".join(lines)


def test_what_went_wrong_stands_at_its_step(recipe_file, train, tmp_path, monkeypatch, tiny_tokenizer) -> None:
    import math

    from tests.stories.poison import poison, rows_with_marks

    poison(monkeypatch, tiny_tokenizer, math.nan)
    rows_with_marks(tmp_path / "rows.jsonl", 240, 6, [5])
    recipe = recipe_file(
        task={"name": "text", "max_length": 64},
        data={"train": [{"path": str(tmp_path / "rows.jsonl")}]},
        guard={"not_finite": "skip"},
    )
    facts = log(train(recipe, tmp_path / "run"))
    assert [(incident["step"], incident["kind"]) for incident in facts["incidents"]] == [(5, "amended")]
    assert "! step 5: loss is nan; step 5 skipped" in tree(facts)
