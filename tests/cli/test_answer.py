"""What a command answers, as text and as JSON, and the exit code that goes with it."""

import click
import pytest
from click.testing import CliRunner, Result

from finetune.cli.answer import Answer, answers
from finetune.errors import RunError


def asked(answer: Answer, *arguments: str) -> Result:
    @click.command()
    @answers
    def command() -> Answer:
        return answer

    return CliRunner().invoke(command, arguments)


def refuse() -> None:
    raise RunError("the disk is full")


def test_a_reader_gets_the_text_and_a_program_the_facts() -> None:
    answer = Answer({"loss": float("nan"), "steps": (1, 2)}, "two steps")
    assert asked(answer).output == "two steps\n"
    assert asked(answer, "--json").output == '{"loss": "nan", "steps": [1, 2]}\n'


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_an_answer_that_is_not_good_ends_with_exit_code_1(arguments: tuple[str, ...]) -> None:
    assert asked(Answer({}, ""), *arguments).exit_code == 0
    assert asked(Answer({}, "", is_good=False), *arguments).exit_code == 1


def test_a_reader_sees_the_text_before_a_refusal_and_a_program_the_refusal_alone() -> None:
    answer = Answer({"steps": 3}, "three steps", refuse=refuse)
    shown = asked(answer)
    assert shown.output == "three steps\n" and isinstance(shown.exception, RunError)
    shown = asked(answer, "--json")
    assert shown.output == "" and isinstance(shown.exception, RunError)


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert asked(Answer({}, "text")).output == ""
