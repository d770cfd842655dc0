"""Templates of strangers are rendered in a process with limits before they are rendered here."""

import json
import os
import shutil
from pathlib import Path

import pytest

from finetune.errors import BaseError
from finetune.model.base import load_tokenizer
from finetune.model.base.templates import ANSWERED, LONGEST, decoded, default, names, problem, texts
from finetune.package.verify.checks import CHECKS
from finetune.package.verify.folder import Folder
from tests.hub.client import in_turn

PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "reaches for what the sandbox forbids: access to attribute '__class__' of 'str' object is unsafe.",
    "{{ messages.append(1) }}": "reaches for what the sandbox forbids:",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more than 2 seconds of a processor to render a short conversation",
    "{{ 'x' * 10 ** 10 }}": "needs more than 256 MiB to render a short conversation",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% for message in messages %}": "renders no conversation: TemplateSyntaxError",
    "{{ raise_exception('never') }}": "renders no conversation: TemplateError: never",
    "x" * (LONGEST + 1): "has 200,001 characters, more than 200,000",
}

HOSTILE_OLDER = "{{ ''.__class__.__mro__ }}"


@pytest.mark.slow
@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[:40])
def test_a_hostile_or_broken_template_is_refused_and_the_reason_told(template) -> None:
    assert problem(template).startswith(HOSTILE[template])


def test_usual_templates_pass_also_those_that_want_roles_in_turn(tiny_tokenizer) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
    tracked = PLAIN.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")
    for template in (PLAIN, strict, tracked, tiny_tokenizer.chat_template):
        assert problem(template) is None
    assert len(ANSWERED) == 2


def test_what_was_found_out_of_a_template_is_kept(monkeypatch) -> None:
    assert problem(PLAIN + "{# once #}") is None
    monkeypatch.setattr("finetune.model.base.templates._tried", lambda template: "was tried again")
    assert problem(PLAIN + "{# once #}") is None


def test_all_templates_of_a_tokenizer_are_found() -> None:
    assert texts("a") == ["a"] and texts({"default": "a", "tool": "b"}) == ["a", "b"] and texts(None) == []
    assert texts([{"name": "default", "template": "a"}]) == ["a"]


@pytest.mark.slow
def test_a_base_or_a_recipe_with_a_hostile_template_is_refused_by_plan(tiny_base, recipe_file, tmp_path) -> None:
    recipe = recipe_file()
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    base, own = tmp_path / "base", tmp_path / "own.jinja"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(bomb)
    own.write_text("{{ ''.__class__.__mro__ }}")
    refused, other = in_turn(
        dict(os.environ),
        ("plan", recipe, "--set", f"base.checkpoint={base}"),
        ("plan", recipe, "--set", f"task.template={own}"),
    )
    assert refused[0] == 1 and "base: has a chat template that takes more than 2 seconds of a processor" in refused[2]
    assert other[0] == 1 and "own.jinja: the template reaches for what the sandbox forbids" in other[2]


def test_the_template_that_only_a_processor_would_read_is_taken_where_there_is_no_other(tiny_base, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    assert load_tokenizer(base).chat_template != "another", "chat_template.jinja comes first"
    own = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    assert load_tokenizer(base).chat_template == "another"
    (base / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    assert load_tokenizer(base).chat_template == own
    (base / "chat_template.json").write_text(json.dumps({"chat_template": HOSTILE_OLDER}))
    with pytest.raises(BaseError, match="has a chat template that reaches for what the sandbox forbids"):
        load_tokenizer(base)
    assert [each.check for each in CHECKS["template"](Folder(base))] == ["template"]
    (base / "chat_template.json").write_text('{"chat_template": 7}')
    with pytest.raises(BaseError, match="its chat_template.json is damaged: its `chat_template` is not text"):
        load_tokenizer(base)


def test_a_template_is_read_without_its_mark_and_with_plain_line_ends(tmp_path) -> None:
    assert decoded(b"\xef\xbb\xbfone\r\ntwo\rthree") == "one\ntwo\nthree"
    with pytest.raises(ValueError, match="is not UTF-8: line 2 has the byte 0xe9"):
        decoded("one\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8: line 1 has the byte 0xff"):
        decoded("\ufeffone".encode("utf-16-le"))


@pytest.mark.parametrize(
    ("kept", "used", "others"),
    [
        (None, None, []),
        ("one", "one", []),
        ({"default": "one", "rag": "two"}, "one", ["default", "rag"]),
        ({"tool_use": "three", "rag": "two"}, None, ["rag", "tool_use"]),
    ],
)
def test_of_several_templates_the_default_is_used(kept, used, others) -> None:
    assert (default(kept), names(kept)) == (used, others)
