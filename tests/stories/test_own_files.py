"""Four newcomers bring the files they have: from the file to learning in a recipe of five lines, and no file is edited."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from finetune.recipe.load import load
from finetune.training.resolve import resolve
from tests.conftest import CHATML

TOOLS = json.dumps([{"name": "count"}])
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | map(attribute='name') | join) + '<|im_end|>\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def reviews(folder: Path) -> str:
    """A table with labels, as a spreadsheet writes it."""
    rows = [("It said what was asked; twice", 1), ('He said "no"', 0), ("the model reads a row", 1), ("of it", 0)]
    lines = [f'"{text.replace(chr(34), chr(34) * 2)}";{label}' for text, label in rows]
    (folder / "reviews.csv").write_text("text;label\n" + "\n".join(lines) + "\n")
    return '{path: reviews.csv, prompt: "{text}", completion: "{label}"}'


def agents(folder: Path) -> str:
    """Conversations with tools, as a data set of agents has them."""
    turns = [
        ("human", "what was it"),
        ("function_call", json.dumps({"name": "count", "arguments": {"of": 4}})),
        ("observation", "4"),
        ("gpt", "it has four"),
    ]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": TOOLS}
    (folder / "agents.json").write_text(json.dumps([row] * 2 + [row | {"system": "said"}]))
    return "{path: agents.json}"


def notes(folder: Path) -> str:
    """A folder of notes, some in folders of their own."""
    (folder / "notes/more").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "more/c", "more/d")):
        (folder / f"notes/{name}.md").write_text(f"# The row {number}\n\nit has said what was asked of it\n")
    return "{path: notes}"


def export(folder: Path) -> str:
    """A Parquet export of a chat product: each conversation is JSON in a column."""
    talk = [{"role": "user", "content": "it was"}, {"role": "assistant", "content": "said"}]
    table = pyarrow.table({"id": [1, 2, 3], "messages": [json.dumps(talk)] * 2 + [json.dumps(talk + talk)]})
    parquet.write_table(table, folder / "export.parquet")
    return "{path: export.parquet}"


@pytest.mark.parametrize(
    ("brought", "task", "learnt"),
    [
        (reviews, "chat", ["1<|im_end|>", "0<|im_end|>", "1<|im_end|>", "0<|im_end|>"]),
        (agents, "chat", ['{"name": "count", "arguments": {"of": 4}}<|im_end|>it has four<|im_end|>'] * 3),
        (notes, "text", [f"# The row {number}\n\nit has said what was asked of it\n<|im_end|>" for number in range(4)]),
        (export, "chat", ["said<|im_end|>"] * 2 + ["said<|im_end|>" * 2]),
    ],
)
def test_a_newcomer_goes_from_a_file_to_learning_in_five_lines(
    brought, task, learnt, tmp_path, monkeypatch, tiny_base, train, tiny_tokenizer
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_base)
    template = ""
    if brought is agents:
        (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
        template = ", template: tools.jinja"
    recipe = tmp_path / "own.yaml"
    lines = [
        "base: {checkpoint: ./base}",
        f"task: {{name: {task}, max_length: 128{template}}}",
        f"data: {{train: [{brought(tmp_path)}]}}",
        "optimizer: {learning_rate: 1e-3}",
        "train: {epochs: 1, batch_size: 4, precision: fp32}",
    ]
    recipe.write_text("\n".join(lines) + "\n")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and "base" not in file.parts}
    examples = resolve(load(recipe)).train
    found = [examples[number] for number in range(len(examples))]
    masks = [example.supervised.copy() for example in found]
    assert [tiny_tokenizer.decode(example.tokens[mask]) for example, mask in zip(found, masks, strict=True)] == learnt
    run = train(recipe, tmp_path / "run")
    assert (run / "checkpoints/step-00000001/manifest.json").is_file()
    assert {file: file.read_bytes() for file in before} == before


def test_the_template_of_the_base_takes_no_tools_and_says_so(tiny_base, tmp_path, monkeypatch, recipe_file):
    monkeypatch.chdir(tmp_path)
    agents(tmp_path)
    with pytest.raises(Exception, match=r"the rendered text lacks `tools\[0\].name`"):
        resolve(load(recipe_file(data={"train": [{"path": "agents.json"}]})))
    assert "tool" not in CHATML
