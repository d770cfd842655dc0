"""What public fine-tuning configurations ask for beside the shapes of rows, each in a recipe that is planned: templates, ends, schedules."""

import gzip
import json

import pytest

from finetune.errors import DataError
from finetune.recipe.load import load
from finetune.training.resolve import resolve

TALK = [{"role": "user", "content": "it was"}, {"role": "assistant", "content": "said"}]
ALPACA = [
    {"instruction": "reads", "input": "a row", "output": "said"},
    {"instruction": "writes", "input": "", "output": "it"},
]
END = "<|im_end|>"
FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['reasoning_content'] %}{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if quiet %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@pytest.fixture
def planned(recipe_file, tmp_path, monkeypatch):
    """A function from rows and sections of a recipe to the plan and the texts that are learnt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forgets.jinja").write_text(FORGETS)

    def planned(rows, name="rows.json", source=None, task=None, data=None, **sections):
        text = (
            json.dumps(rows)
            if name.startswith("rows.json") and "jsonl" not in name
            else "".join(json.dumps(row) + "\n" for row in rows)
        )
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        sections["task"] = {"name": "chat", "max_length": 96} | (task or {})
        sections["data"] = {"train": [{"path": name} | (source or {})]} | (data or {})
        resolved = resolve(load(recipe_file(**sections)))
        found = [resolved.train[number] for number in range(len(resolved.train))]
        return resolved.plan, [resolved.tokenizer.decode(each.tokens[each.supervised]) for each in found]

    return planned


@pytest.mark.parametrize(
    ("rows", "options", "learnt"),
    [
        pytest.param(
            ALPACA, {"task": {"template": "chatml"}}, [f"said{END}", f"it{END}"], id="alpaca rows, a template by name"
        ),
        pytest.param(
            [{"prompt": "it was ", "completion": "said"}],
            {"task": {"template": "plain"}},
            [f" said{END}"],
            id="plain prompt and answer",
        ),
        pytest.param(
            [{"messages": TALK}] * 3, {"source": {"take": 2}}, [f"said{END}"] * 2, id="at most so many rows of a file"
        ),
        pytest.param(
            [{"messages": TALK, "lang": "en"}, {"messages": TALK, "lang": "de"}],
            {"source": {"where": "lang == de", "skip": ["lang"]}},
            [f"said{END}"],
            id="rows are filtered",
        ),
        pytest.param([{"messages": TALK}], {"name": "rows.jsonl.gz"}, [f"said{END}"], id="rows are packed"),
        pytest.param(
            [{"messages": TALK}],
            {"task": {"system": "the model"}},
            [f"said{END}"],
            id="one system message before each row",
        ),
        pytest.param(
            [{"messages": TALK + TALK}], {"task": {"learn": "last"}}, [f"said{END}"], id="the last turn alone"
        ),
        pytest.param(
            [{"messages": TALK}],
            {"task": {"learn": "all"}},
            ["<|im_start|>user\nit was<|im_end|>\n<|im_start|>assistant\nsaid<|im_end|>\n"],
            id="the prompt too",
        ),
        pytest.param(
            [
                {
                    "messages": [
                        turn | ({"reasoning_content": "hm"} if turn["role"] == "assistant" else {})
                        for turn in TALK + TALK
                    ]
                }
            ],
            {"task": {"template": "forgets.jinja"}},
            [f"<think>hm</think>said{END}"] * 2,
            id="thinking in a field of its own, a template that renders a turn differently once others follow",
        ),
        pytest.param(
            [{"messages": TALK}],
            {"task": {"template": "forgets.jinja", "template_variables": {"quiet": True}}},
            [f"said{END}"],
            id="variables for the template",
        ),
        pytest.param(
            [{"messages": TALK}],
            {"task": {"stop": "<|endoftext|>"}},
            [f"said{END}"],
            id="an end of turn that is not the base's end token",
        ),
    ],
)
def test_a_public_configuration_s_feature_is_a_key_of_a_recipe(planned, rows, options, learnt):
    _, found = planned(rows, **options)
    assert found == learnt


def test_a_floor_under_the_cosine_and_other_schedules_are_keys_of_a_recipe(planned):
    rows, train = [{"messages": TALK}] * 8, {"steps": 20, "batch_size": 4, "precision": "fp32"}
    for schedule, own, last in (
        ("cosine", {"min_learning_rate": 1e-4}, 1e-4),
        ("cosine", {"min_learning_rate": "10%"}, 1e-4),
        ("wsd", {}, None),
    ):
        optimizer = {"learning_rate": 1e-3, "schedule": schedule, "warmup": 2} | own
        plan, _ = planned(rows, optimizer=optimizer, train=train)
        assert plan.learning_rate(2) == 1e-3
        assert last is None or last < plan.learning_rate(20) < 1.1 * last


def test_a_built_in_template_whose_tokens_the_base_lacks_is_refused_with_those_it_could_use(planned):
    with pytest.raises(DataError) as caught:
        planned([{"messages": TALK}], task={"template": "llama3"})
    assert str(caught.value) == (
        "task.template: the base's tokenizer lacks tokens of the template `llama3`: `<|begin_of_text|>`, `<|start_header_id|>`, "
        "`<|end_header_id|>`, `<|eot_id|>`\nhint: it has all tokens of: alpaca, chatml, plain, plain-lines, tulu, vicuna, zephyr"
    )
