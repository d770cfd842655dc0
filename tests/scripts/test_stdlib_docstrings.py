"""The quickstart's data: clean, deterministic, and with nothing shared between the two sides."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "scripts" / "stdlib_docstrings.py"


def write_rows(folder: Path, hash_seed: str) -> Path:
    subprocess.run([sys.executable, SCRIPT, folder], check=True, env={"PYTHONHASHSEED": hash_seed})
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def code_of(row: dict) -> str:
    return row["messages"][0]["content"].partition("\n\n")[2]


def answer_of(row: dict) -> str:
    return row["messages"][1]["content"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("stdlib"), hash_seed="1")


@pytest.fixture(scope="module")
def train(folder):
    return rows_of(folder / "train.jsonl")


@pytest.fixture(scope="module")
def holdout(folder):
    return rows_of(folder / "holdout.jsonl")


def test_there_are_enough_rows_to_train_and_to_compare(train, holdout):
    assert len(train) >= 1500
    assert len(holdout) == 120


def test_both_sides_come_from_different_modules(train, holdout):
    train_modules, holdout_modules = ({row["source"].split(".")[0] for row in rows} for rows in (train, holdout))
    assert train_modules.isdisjoint(holdout_modules)
    assert len(holdout_modules) >= 5


def test_both_sides_share_no_code_and_no_answer(train, holdout):
    assert {code_of(row) for row in train}.isdisjoint(code_of(row) for row in holdout)
    assert {answer_of(row) for row in train}.isdisjoint(answer_of(row) for row in holdout)


def test_no_docstring_is_left_in_a_prompt(train, holdout):
    for row in train + holdout:
        function = ast.parse(code_of(row)).body[0]
        assert ast.get_docstring(function) is None, row["source"]
        assert answer_of(row) not in code_of(row), row["source"]


def test_every_answer_is_one_sentence_on_one_line(train, holdout):
    for row in train + holdout:
        answer = answer_of(row)
        assert answer[0].isupper() and answer.endswith(".") and "\n" not in answer, row["source"]
        assert 20 <= len(answer) <= 300, row["source"]


def test_the_same_interpreter_writes_the_same_bytes(folder, tmp_path):
    again = write_rows(tmp_path / "again", hash_seed="2")
    for name in ("train.jsonl", "holdout.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
