"""Each feature of rows that public configurations use, as a small recipe: what is read of its files, to the letter."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from finetune.data import preflight
from finetune.data.conversation import conversation_of
from finetune.data.plain_text import content_of
from finetune.data.sources.open import open_source
from finetune.errors import DataError
from finetune.recipe.load import load

PLACE = Path(__file__).parents[2] / "corpus/shapes"
EXPECTED = YAML(typ="safe", pure=True).load(PLACE / "expected.yaml")


def read(name: str) -> Iterator[object]:
    """What each source of a recipe is: the format, then a line for each message or text."""
    loaded = load(f"{name}.yaml")
    preflight.check(loaded)
    form, skips_bad = loaded.recipe.task.row_form, loaded.recipe.data.on_bad_row == "skip"
    for source in loaded.recipe.data.train:
        rows = open_source(source, form=form, skips_bad=skips_bad)
        yield rows.choice.name
        for number in range(len(rows)):
            try:
                yield shown(rows[number], rows.where(number), form)
            except DataError as error:
                assert skips_bad
                yield f"bad: {error.where}"


def shown(row: dict, where: str, form: str) -> object:
    if form == "text":
        content = content_of(row, where)
        return (
            content if isinstance(content, str) else {"ids": content.ids, "learnt": list(map(int, content.supervised))}
        )
    conversation = conversation_of(row, where)
    turns = [
        " ".join(
            filter(None, (message["role"], "*" * (number in conversation.turns), message["content"], calls(message)))
        )
        for number, message in enumerate(conversation.messages)
    ]
    return [*(f"tool {tool.get('function', tool)['name']}" for tool in conversation.tools or ()), *turns]


def calls(message: dict) -> str:
    called = [call["function"] for call in message.get("tool_calls", ())]
    return " ".join(f"{each['name']}({each['arguments']})" for each in called)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_reads_the_rows_of_its_feature(name, monkeypatch) -> None:
    monkeypatch.chdir(PLACE)
    assert list(read(name)) == EXPECTED[name]


def test_every_recipe_has_its_rows_in_the_table() -> None:
    assert {path.stem for path in PLACE.glob("*.yaml")} - {"expected"} == {*EXPECTED}
