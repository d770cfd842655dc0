"""Metrics of a model's answers: what each gives for a row, and what becomes of programs that fail."""

import sys

import pytest

from finetune.compare.scores import definition, name_of, of_function, scores
from finetune.errors import FinetuneError
from finetune.recipe.schema.metrics import ExactMatch, Json, Program, Regex, Rouge


def row(answer: str, expected: str, number: int = 0) -> dict:
    return {"row": number, "prompt": "ask", "answer": answer, "expected": expected, "loss": 1.5, "tokens": 4}


def score(metric, answer: str, expected: str = "") -> float:
    return scores([metric], [row(answer, expected)])[metric.name][0]


def program(code: str, timeout_seconds: float = 60.0) -> Program:
    return Program(name="mine", program=[sys.executable, "-c", code], timeout_seconds=timeout_seconds)


@pytest.mark.parametrize(
    ("answer", "expected", "found"), [(" 42\n", "42", 1.0), ("42.", "42", 0.0), ("", "", 1.0), ("Yes", "yes", 0.0)]
)
def test_exact_match_looks_past_blanks_around_an_answer(answer, expected, found) -> None:
    assert score(ExactMatch(name="exact_match"), answer, expected) == found


def test_a_pattern_with_a_group_compares_what_it_found_last() -> None:
    metric = Regex(name="regex", pattern=r"answer is (\d+)")
    assert score(metric, "the answer is 3; no, the answer is 42", "so the answer is 42") == 1.0
    assert score(metric, "the answer is 3", "so the answer is 42") == 0.0
    assert score(metric, "the answer is 42", "42") == 1.0
    assert score(metric, "no idea", "42") == 0.0


def test_a_pattern_without_a_group_is_looked_for() -> None:
    metric = Regex(name="regex", pattern=r"^def \w+")
    assert (score(metric, "def one(): pass"), score(metric, "x = 1")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "found"),
    [('{"a": 1}', 1.0), ("[NaN]", 0.0), ("{'a': 1}", 0.0), ("", 0.0), ("[" * 100_000, 0.0), ("7", 1.0)],
)
def test_json_is_what_a_strict_reader_takes(answer, found) -> None:
    assert score(Json(name="json"), answer) == found


@pytest.mark.slow
def test_json_may_have_to_match_a_schema(tmp_path) -> None:
    pytest.importorskip("jsonschema")
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}')
    metric = Json(name="json", matches=str(file))
    assert [score(metric, text) for text in ('{"a": 1}', '{"a": "1"}', '{"b": 1}', "[]")] == [1.0, 0.0, 0.0, 0.0]
    before = definition([metric])
    file.write_text('{"type": 3}')
    assert definition([metric]) != before
    with pytest.raises(FinetuneError, match="is no JSON Schema: "):
        score(metric, "{}")


def test_rouge_is_that_of_the_reference_package() -> None:
    pytest.importorskip("rouge_score")
    metric = Rouge(name="rouge")
    assert score(metric, "the cat sat on the mat", "the cat lay on the mat") == pytest.approx(5 / 6)
    assert (score(metric, "", "the cat"), score(metric, "dogs", "cats")) == (0.0, 0.0)


def test_a_program_gets_json_lines_and_writes_a_score_for_each() -> None:
    code = "import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['answer']))"
    found = scores([program(code)], [row("ü\n", "x", 3), row("four", "x", 9)])
    assert found == {"mine": [2.0, 4.0]}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.stdin.read(); print('boom', file=sys.stderr); sys.exit(3)", "ended with exit code 3\n  boom"),
        ("print(1)", "wrote 1 score for 2 rows"),
        ("print(1); print('many')", "line 2: `many` is not a finite number"),
        ("print(1); print('nan')", "line 2: `nan` is not a finite number"),
        ("import os; os.kill(os.getpid(), 9)", "ended with exit code -9"),
    ],
)
def test_a_program_that_fails_says_how(code, message) -> None:
    with pytest.raises(FinetuneError) as caught:
        scores([program(code)], [row("a", "b"), row("c", "d")])
    assert message in str(caught.value) and caught.value.where == "metric mine" and caught.value.hint


def test_a_program_that_is_late_ends_with_all_that_it_started() -> None:
    code = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    with pytest.raises(FinetuneError, match="took more than 0.5 seconds"):
        scores([program(code, 0.5)], [row("a", "b")])


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(FinetuneError, match="/no/such cannot be started: no such file or directory"):
        scores([Program(name="mine", program=["/no/such"])], [row("a", "b")])


def test_a_program_that_reads_nothing_is_given_many_rows() -> None:
    rows = [row("x" * 1000, "y", number) for number in range(500)]
    assert scores([program("for number in range(500): print(number)")], rows)["mine"][499] == 499.0


def test_what_a_program_is_counts_with_the_content_of_its_files(tmp_path) -> None:
    script = tmp_path / "score.py"
    script.write_text("print(1)")
    metric = Program(name="mine", program=[sys.executable, str(script)])
    before = definition([metric])
    script.write_text("print(2)")
    assert definition([metric]) != before


def test_a_function_of_yours_gives_numbers() -> None:
    def shorter(row) -> float:
        return len(row["answer"])

    assert of_function(shorter, [row("abc", "")]) == [3.0] and name_of(shorter) == "shorter"
    with pytest.raises(FinetuneError, match="row 7: `None` is not a finite number"):
        of_function(lambda row: None, [row("abc", "", 7)])
    with pytest.raises(ZeroDivisionError):
        of_function(lambda row: 1 / 0, [row("abc", "")])
