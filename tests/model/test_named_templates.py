"""The built-in chat templates: each takes turns on a base that has its tokens, and only there."""

import fnmatch
import tomllib
from pathlib import Path

import pytest

from finetune.errors import DataError
from finetune.model.base import named
from tests.zoo import oracle
from tests.zoo.catalog import Specimen, tokenizer_with
from tests.zoo.judge import judged
from tests.zoo.matrix import encode
from tests.zoo.rows import ROWS

WITH_TOOLS = {"chatml", "llama3", "mistral-v7"}
WITH_THOUGHTS = {"chatml"}
ENDS = {token for tokens in named.TOKENS.values() for token in tokens if "end" in token or "eot" in token}


def specimen(name: str) -> Specimen:
    """The template on a base that has its tokens, and whose own begin and end tokens are others."""
    own = [token for token in named.TOKENS[name] if token not in (named.BEGIN, named.END)]
    stops = ["</s>", *(token for token in own if token in ENDS and token != "<|end_header_id|>")]
    return Specimen(name, "", named.text_of(name), "</s>", stops, ["<s>", "</s>", *own], [], "<s>", {}, False)


def test_each_template_has_a_file_and_each_file_a_name() -> None:
    files = {path.stem for path in Path(named.__file__).parent.glob("*.jinja")}
    assert files == {*named.NAMES}
    with pytest.raises(KeyError):
        named.text_of("../named/chatml")


def test_the_files_are_part_of_the_wheel() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["finetune.model.base.named"]
    for name in named.NAMES:
        assert any(fnmatch.fnmatch(f"{name}.jinja", pattern) for pattern in patterns)


@pytest.mark.parametrize("name", named.NAMES)
def test_a_built_in_template_takes_turns_and_a_system_message(name: str) -> None:
    for kind in ("one turn", "two turns", "system + turns"):
        verdict = judged(specimen(name), ROWS[kind], encode)
        assert verdict.state == "ok", f"{kind}: {verdict.why}"
        assert verdict.why == "1 examples", kind


@pytest.mark.parametrize("name", named.NAMES)
def test_a_built_in_template_renders_a_turn_alike_once_others_follow(name: str) -> None:
    messages = ROWS["system + turns"]["messages"]
    whole = oracle.render(specimen(name), messages, None, has_prompt=False)
    for number in range(2, len(messages)):
        is_answer = messages[number]["role"] == "assistant"
        assert whole.startswith(oracle.render(specimen(name), messages[:number], None, has_prompt=is_answer))


@pytest.mark.parametrize("name", named.NAMES)
def test_a_built_in_template_writes_tools_and_thoughts_or_refuses_them(name: str) -> None:
    for kind, takers in (("tool call", WITH_TOOLS), ("arguments as text", WITH_TOOLS), ("reasoning", WITH_THOUGHTS)):
        verdict = judged(specimen(name), ROWS[kind], encode)
        assert verdict.state == ("ok" if name in takers else "refused"), f"{kind}: {verdict.why}"


def test_chatml_on_a_base_that_begins_with_a_turn_has_one_begin_token() -> None:
    base = specimen("chatml")._replace(bos="<|im_start|>", eos="<|im_end|>")
    text = oracle.render(base, ROWS["one turn"]["messages"], None, has_prompt=False)
    assert text.startswith("<|im_start|>user")


def test_a_base_without_the_tokens_of_a_template_is_refused_and_told_which_it_could_use() -> None:
    tokenizer = tokenizer_with(("<s>", "</s>", "<|im_start|>"), (), "<s>", "</s>")
    named.refuse_missing(tokenizer, "alpaca")
    with pytest.raises(DataError) as caught:
        named.refuse_missing(tokenizer, "chatml")
    assert str(caught.value) == (
        "task.template: the base's tokenizer lacks tokens of the template `chatml`: `<|im_end|>`\n"
        "hint: it has all tokens of: alpaca, llama2, mistral, plain, plain-lines, tulu, vicuna, zephyr"
    )


def test_a_base_without_an_end_token_is_refused() -> None:
    tokenizer = tokenizer_with(("<s>",), (), "<s>", "</s>")
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match="lacks tokens of the template `plain`: an end token\nhint: .* none of the built-in"
    ):
        named.refuse_missing(tokenizer, "plain")
