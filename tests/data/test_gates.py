"""A new run does not begin with rows that are a mistake, unless the recipe says that they are meant."""

import json
from typing import get_args

import pytest

from finetune.data.gates import GATES
from finetune.errors import DataError
from finetune.recipe.load import load
from finetune.recipe.schema.data import Gate
from finetune.store.run.directory import RunDirectory
from finetune.training.readiness import refuse_gated
from finetune.training.resolve import resolve
from tests.conftest import chat_row

LONG = " the row ends" * 60


def answered(number: int, answer: str) -> dict:
    row = chat_row(number)
    row["messages"][1]["content"] = answer
    return row


@pytest.fixture
def refusal(recipe_file, tmp_path):
    """What the gates say of some rows; None where they are open."""

    def refusal(rows, allow=(), holdout=(), task=None) -> str | None:
        for name, some in (("rows", rows), ("holdout", holdout)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "allow": [*allow]}
        data |= {"holdout": [{"path": str(tmp_path / "holdout.jsonl")}]} if holdout else {}
        recipe = recipe_file(data=data, task=task or {"name": "chat", "max_length": 64})
        try:
            refuse_gated(resolve(load(recipe)), "recipe.yaml")
        except DataError as error:
            return str(error)
        return None

    return refusal


def test_the_gates_are_those_of_the_recipe() -> None:
    assert {*GATES} == {*get_args(Gate)}


def test_up_to_one_row_in_twenty_may_be_cut(refusal) -> None:
    rows = [chat_row(number) for number in range(38)]
    assert refusal([*rows, answered(38, LONG), answered(39, LONG)]) is None
    assert refusal([*rows, *(answered(number, LONG) for number in range(38, 41))]) == (
        "recipe.yaml: task.max_length cuts 3 of 41 rows (7.3%), and with them 979 of 1,372 supervised tokens (71.4%)\n"
        "hint: raise task.max_length, or shorten the rows; or start all the same with data.allow: [cut_rows]"
    )
    assert refusal([*rows, *(answered(number, LONG) for number in range(38, 41))], ["cut_rows"]) is None


def test_a_row_of_which_nothing_is_learnt_is_refused(refusal) -> None:
    rows = [chat_row(number) for number in range(40)]
    rows[7]["messages"][0]["content"] = LONG
    said = refusal(rows)
    assert said.startswith("recipe.yaml: task.max_length cuts the whole answer of 1 of 40 rows away\nhint: ")
    assert refusal(rows, ["nothing_learnt"]) is None


def test_a_source_whose_every_answer_loses_its_end_is_refused_for_that_too(refusal) -> None:
    said = refusal([answered(number, f"{number}{LONG}") for number in range(20)], ["cut_rows"])
    assert "no stop token is learnt in the first 20 examples of " in said
    assert said.endswith("with data.allow: [cut_rows, unlearnt_stop]")


def test_held_out_rows_that_are_trained_on_are_refused(refusal) -> None:
    rows = [chat_row(number) for number in range(20)]
    said = refusal(rows, holdout=[rows[3], chat_row(50)])
    assert said.startswith("recipe.yaml: 1 of 2 held-out rows are training rows of this run\n")
    assert refusal(rows, ["seen_holdout"], holdout=[rows[3], chat_row(50)]) is None


def test_text_that_a_template_drops_is_lost_only_where_that_is_allowed(refusal, tmp_path) -> None:
    rows = [chat_row(number) for number in range(20)]
    rows[4]["messages"][1]["reasoning_content"] = "because of the weather"
    with pytest.raises(AssertionError):
        assert refusal(rows) is None
    assert refusal(rows, ["lost_text"]) is None
    assert "reasoning_content" in refusal(rows), "rows that were encoded with the gate open are not found in the cache"


def test_a_template_without_a_stop_token_is_used_only_where_that_is_allowed(refusal, tmp_path) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "plain.jinja").write_text(plain)
    task = {"name": "chat", "max_length": 64, "template": str(tmp_path / "plain.jinja")}
    rows = [chat_row(number) for number in range(20)]
    assert "would not stop" in refusal(rows, task=task)
    assert refusal(rows, ["unlearnt_stop"], task=task) is None


def test_a_resume_passes_no_gate_again(recipe_file, train, tmp_path, monkeypatch) -> None:
    run = train(recipe_file(train={"steps": 1, "batch_size": 2, "precision": "fp32"}), tmp_path / "run")
    monkeypatch.setattr("finetune.training.resume.refuse_gated", lambda *given: pytest.fail("asked again"))
    train(recipe_file(train={"steps": 1, "batch_size": 2, "precision": "fp32"}), run)
    assert RunDirectory(run).is_run
