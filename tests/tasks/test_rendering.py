"""A conversation is rendered with the day of the plan, and whatever a template raises is one error with its cause."""

import json

import pytest
import torch

from finetune.compare.evaluate import evaluate
from finetune.compare.generation.answerer import open_answerer
from finetune.compare.prompts import of_text, questions_of
from finetune.errors import DataError
from finetune.recipe.load import load
from finetune.store.run.directory import RunDirectory
from finetune.tasks import rendering
from finetune.tasks.rendering import Renderer, prints_date
from finetune.training.resolve import resolve
from tests.conftest import CHATML

DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
# As Llama 3.2 has it
DATE_STRING = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ date_string }}"
) + CHATML
ROW = {"messages": [{"role": "user", "content": "it was"}, {"role": "assistant", "content": "said"}]}
QUESTION = ROW["messages"][:1]


class Clock(rendering.datetime):
    """Another day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 6)


@pytest.fixture
def later(monkeypatch):
    """A function after which it is another day, for templates and for plans."""

    def later() -> None:
        from transformers.utils import chat_template_utils

        class Day(rendering.date):
            @classmethod
            def today(cls):
                return cls(2031, 5, 6)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(rendering, "date", Day)
        monkeypatch.setattr("finetune.training.run.date", Day)

    return later


@pytest.mark.parametrize("template", [DATED, DATE_STRING])
def test_a_template_that_prints_the_date_is_found_and_given_one(tiny_tokenizer, template):
    assert prints_date(template) and not prints_date(CHATML)
    assert not prints_date("{% if date_string is defined %}{{ date_string }}{% endif %}" + CHATML)
    assert "26 Jul 2024" in Renderer(tiny_tokenizer, template, "2024-07-26").text(QUESTION)
    assert "01 Feb 2023" in Renderer(tiny_tokenizer, template, "2023-02-01").text(QUESTION)
    assert "2024" not in Renderer(tiny_tokenizer, template).text(QUESTION), "the clock's"
    plain = tiny_tokenizer.apply_chat_template(QUESTION, chat_template=template, tokenize=False)
    assert "2023" not in plain, "transformers shares its templates with the rest of the process"


@pytest.fixture
def dated(recipe_file, tmp_path):
    """A recipe of two steps whose template prints the date."""
    (tmp_path / "dated.jinja").write_text(DATED)
    steps = {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128}
    task = {"name": "chat", "max_length": 128, "template": str(tmp_path / "dated.jinja")}
    return recipe_file(task=task, train=steps)


@pytest.mark.slow
def test_a_plan_has_the_day_that_its_template_prints_and_keeps_it(dated, recipe_file, train, tmp_path, later, capsys):
    run = train(dated, tmp_path / "run")
    plan, _ = RunDirectory(run).plan()
    before = [evaluate([f"{run}@2"], rows, [], is_again=True) for rows in (None, dated)]
    later()
    assert [evaluate([f"{run}@2"], rows, [], is_again=True) for rows in (None, dated)] == before
    assert resolve(load(dated), plan).plan == plan, "resumed"
    assert resolve(load(dated), like=plan).plan.date == plan.date, "branched"
    another = resolve(load(dated)).plan
    assert (another.date, another.plan_id == plan.plan_id) == ("2031-05-06", False)
    assert resolve(load(recipe_file("other"))).plan.date is None
    answerer = open_answerer(f"{run}@2")
    (question,) = questions_of(answerer, [of_text("it was", "")])
    assert "06 May 2031" not in answerer.tokenizer.decode(question.ids), "what answers follow"
    assert "prints the date" not in capsys.readouterr().err


def test_a_plan_of_older_code_without_a_day_says_so_where_its_template_prints_one(dated, recipe_file, later, capsys):
    plan = resolve(load(dated)).plan.model_copy(update={"date": None})
    later()
    resumed = resolve(load(dated), plan)
    assert resumed.plan == plan
    assert capsys.readouterr().err == (
        "the chat template prints the date, and this run's plan has none: rows are rendered with 2031-05-06\n"
    )
    assert "06 May 2031" in resumed.tokenizer.decode(resumed.train[0].tokens)
    older = resolve(load(recipe_file("other"))).plan
    assert resolve(load(recipe_file("other")), older).plan == older and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("failing", "cause"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
        ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages[9]['content'] }}", "UndefinedError: list object has no element 9"),
        ("{{ '%d' | format('x') }}", "TypeError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}", "RecursionError: "),
        ("{{ {}['a'] | tojson }}", "TypeError: Object of type Undefined is not JSON serializable"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError: 'utf-8' codec can't encode character"),
        ("{{ messages | nosuch }}", "TemplateAssertionError: No filter named 'nosuch'"),
    ],
)
def test_whatever_a_template_raises_is_one_error_with_its_cause(tiny_tokenizer, failing, cause):
    with pytest.raises(DataError) as caught:
        Renderer(tiny_tokenizer, failing).text(QUESTION, "data.jsonl:7")
    said, hint = str(caught.value).split("\n")
    assert said.startswith(f"data.jsonl:7: the chat template fails on the row: {cause}")
    assert hint.startswith("hint: look at what this row has that others have not")


def test_rows_of_a_dated_template_are_encoded_again_on_another_day(dated, later):
    resolve(load(dated))
    later()
    resolved = resolve(load(dated))
    assert "06 May 2031" in resolved.tokenizer.decode(torch.tensor(resolved.train[0].tokens))
    assert json.loads(resolved.plan.dump({}))["date"] == "2031-05-06"
