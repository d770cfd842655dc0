"""A recipe is read with the line of every key, and everything that is wrong with it is said at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from finetune.errors import RecipeError
from finetune.recipe.load import LoadedRecipe, load, loads
from finetune.recipe.schema import Recipe

CORPUS = Path(__file__).parent.parent / "corpus"
EXPECTED = YAML(typ="safe", pure=True).load(CORPUS / "expected.yaml")

SMALLEST = """\
base: {checkpoint: owner/model}
task: {name: chat}
data:
  train:
    - path: a.jsonl
    - path: b.jsonl
optimizer:
  learning_rate: 2e-4
train: {epochs: 1}
"""


def edited(old: str, new: str, *overrides: str) -> LoadedRecipe:
    assert old in SMALLEST
    return loads(SMALLEST.replace(old, new), "recipe.yaml", overrides)


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loads(text, "recipe.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", EXPECTED["recipes"])
def test_a_broken_recipe_gets_exactly_its_message(name, monkeypatch):
    monkeypatch.chdir(CORPUS)
    with pytest.raises(RecipeError) as caught:
        load(Path("recipes", name))
    assert str(caught.value) == EXPECTED["recipes"][name]


def test_every_file_of_the_corpus_is_in_the_table_and_there_are_at_least_forty():
    files = {path.name for folder in ("recipes", "data") for path in (CORPUS / folder).iterdir()}
    sections = {section: entries for section, entries in EXPECTED.items() if section != "columns"}
    assert files == {name for entries in sections.values() for name in entries}
    assert len(files) >= 40


def test_the_text_is_kept_to_the_letter_and_every_key_has_its_line(tmp_path):
    text = "# why\r\n" + SMALLEST
    (tmp_path / "recipe.yaml").write_bytes(text.encode())
    loaded = load(tmp_path / "recipe.yaml")
    assert loaded.text == text
    assert loaded.file == str(tmp_path / "recipe.yaml")
    assert loaded.lines["base.checkpoint"] == 2
    assert loaded.lines["data.train[1]"] == loaded.lines["data.train[1].path"] == 7
    assert loaded.lines["optimizer"] == 8
    assert loaded.lines["optimizer.learning_rate"] == 9


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    assert loads("\ufeff" + SMALLEST, "recipe.yaml").recipe.base.checkpoint == "owner/model"


@pytest.mark.parametrize(
    ("written", "number"),
    [("2e-4", 2e-4), ("1e0", 1.0), ("1E-5", 1e-5), ("1", 1), (".5", 0.5), ("+3.", 3.0), ("001", 1)],
)
def test_a_number_is_a_number_however_it_is_written(written, number):
    assert edited("2e-4", written).recipe.optimizer.learning_rate == number


@pytest.mark.parametrize("word", ["no", "on", "yes", "NO", "y", "off", "2024-01-01", "1:30", "0x10", "1_000"])
def test_words_that_yaml_1_1_turned_into_something_else_are_text(word):
    assert edited("owner/model", word).recipe.base.checkpoint == word


def test_true_and_false_are_the_booleans():
    assert edited("name: chat", "name: chat, packing: false").recipe.task.packing is False


@pytest.mark.parametrize("name", ["chat", "text"])
def test_packing_auto_is_a_recipe_that_does_not_name_packing(name):
    plain, auto = (edited("name: chat", f"name: {name}{packing}").recipe for packing in ("", ", packing: auto"))
    assert auto == plain and auto.task.model_fields_set == plain.task.model_fields_set
    named = edited("name: chat", f"name: {name}, packing: true").recipe
    assert "packing" in named.task.model_fields_set


@pytest.mark.parametrize("value", ["Auto", "[auto]", "1", "null", '"true"'])
def test_packing_is_one_of_three_words(value):
    with pytest.raises(RecipeError, match="task.packing: must be `auto`, `true` or `false`, not "):
        edited("name: chat", f"name: chat, packing: {value}")


def test_a_list_of_two_numbers_becomes_the_betas():
    assert edited("2e-4", "2e-4\n  betas: [0.9, 0.95]").recipe.optimizer.betas == (0.9, 0.95)


def test_the_holdout_is_a_count_a_share_or_sources():
    holdouts = ["200", "5%", "[{path: c.jsonl}]"]
    assert [type(edited("data:", f"data:\n  holdout: {each}").recipe.data.holdout) for each in holdouts] == [
        int,
        str,
        list,
    ]


def test_set_overrides_a_key_a_list_item_and_a_whole_section():
    loaded = loads(
        SMALLEST,
        "recipe.yaml",
        [
            "optimizer.learning_rate=1e-4",
            "data.train[1].path=c.jsonl",
            "train={steps: 5, batch_size: 4}",
            "evaluate.every=10 steps",
            "data.holdout=5%",
        ],
    )
    assert loaded.recipe.optimizer.learning_rate == 1e-4
    assert [source.path for source in loaded.recipe.data.train] == ["a.jsonl", "c.jsonl"]
    assert (loaded.recipe.train.steps, loaded.recipe.train.epochs) == (5, None)
    assert loaded.recipe.evaluate.every.steps == 10
    assert loaded.lines["train.steps"] == loaded.lines["data.train[1].path"] == 0
    assert loaded.lines["data.train[0].path"] == 5


def test_set_to_null_takes_a_key_a_section_or_a_list_item_away():
    text = SMALLEST + "adapter: {name: lora}\nguard: {spike: stop}\n"
    loaded = loads(text, "recipe.yaml", ["adapter=null", "guard.spike=null", "data.train[0]=null", "publish=null"])
    assert loaded.recipe.adapter is None
    assert loaded.recipe.guard.spike == "warn"
    assert [source.path for source in loaded.recipe.data.train] == ["b.jsonl"]


def test_set_fills_a_section_that_the_file_leaves_empty():
    assert edited("train: {epochs: 1}", "train:", "train.steps=3").recipe.train.steps == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs", "--set: `train.epochs` is not like `optimizer.learning_rate=1e-4`"),
        ("=3", "--set: `=3` is not like `optimizer.learning_rate=1e-4`"),
        ("train..epochs=1", "--set: `train..epochs=1` is not like `optimizer.learning_rate=1e-4`"),
        ("train.epochs=", "--set: train.epochs: has no value\nhint: `--set train.epochs=null` takes the key away"),
        ("train.epochs=two", "--set: train.epochs: must be a whole number, not `two`"),
        ("train.epoch=2", "--set: train.epoch: unknown key\nhint: did you mean `train.epochs`?"),
        ("train={epochs: 1, epochs: 2}", "--set: train.epochs: repeated key\nhint: keep one of them"),
        ("train=[1", "--set: train: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.train[2].path=x", "--set: data.train[2].path: there is no item [2]: what should hold it is a list of 2"),
        ("base.checkpoint.x=1", "--set: base.checkpoint.x: there is no key `x`: what should hold it is `owner/model`"),
        ("optimizer.learning_rate=null", "recipe.yaml:7: optimizer.learning_rate: is required"),
    ],
)
def test_a_wrong_override_is_answered_like_the_file(setting, message):
    assert complaint(SMALLEST, setting) == message


def test_problems_of_the_file_come_by_line_and_those_of_set_after_them():
    text = SMALLEST.replace("epochs: 1", "epochs: x").replace("owner/model", "''")
    assert complaint(text, "guard.spike=no").splitlines() == [
        "recipe.yaml:1: base.checkpoint: must not be empty",
        "recipe.yaml:9: train.epochs: must be a whole number, not `x`",
        "--set: guard.spike: must be `ignore`, `warn`, `skip`, `rollback` or `stop`, not `no`",
    ]


def test_a_later_problem_names_the_line_of_the_key_or_of_its_nearest_parent():
    loaded = loads(SMALLEST, "recipe.yaml", ["train.seed=3"])
    assert (
        str(loaded.problem("data.train[1].path", "no such file")) == "recipe.yaml:6: data.train[1].path: no such file"
    )
    assert loaded.problem("data.train[0].columns.text", "").where == "recipe.yaml:5"
    assert loaded.problem("optimizer.warmup", "").where == "recipe.yaml:7"
    assert loaded.problem("adapter.targets", "").where == "recipe.yaml:1"
    assert loaded.problem("train.seed", "").where == "--set"
    assert str(loaded.problem("train", "too long", "less")) == "recipe.yaml:9: train: too long\nhint: less"


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "chat-lora.yaml").write_text(SMALLEST)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "chat-lor.yaml")
    assert (
        str(caught.value) == f"{tmp_path}/chat-lor.yaml: no such file\nhint: did you mean `{tmp_path}/chat-lora.yaml`?"
    )


def test_where_no_name_is_near_the_recipes_beside_it_are_named(tmp_path):
    def hint() -> str:
        with pytest.raises(RecipeError) as caught:
            load(tmp_path / "moe.yaml")
        return str(caught.value).partition("hint: ")[2]

    assert hint() == f"write it, or copy one from recipes/; `{tmp_path}` has no .yaml file"
    for name in ("quickstart.yaml", "chat-lora.yml"):
        (tmp_path / name).write_text(SMALLEST)
    assert hint() == f"there are `{tmp_path}/chat-lora.yml`, `{tmp_path}/quickstart.yaml`"


def test_a_directory_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="is a directory, not a recipe\nhint: name a `.yaml` file in it"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["x" * 70_000, "[" * 60_000, "a: [" + "{}, " * 1_000 + "]", "é" * 40_000])
def test_a_text_too_large_for_a_recipe_is_refused_before_it_is_parsed(text):
    assert "is too large for a recipe\nhint: at most 65,536 bytes and 1,000 brackets" in complaint(text)


def test_a_large_file_is_refused_without_reading_it_all(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff" * 100_000)
    with pytest.raises(RecipeError, match="is too large for a recipe"):
        load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("text", ['a: "\\UFFFFFFFF"', 'a: "\\ud800"', '"\\ud800": 1'])
def test_an_escape_that_names_no_character_is_an_error_of_the_recipe(text):
    assert complaint(text) == "recipe.yaml:1: is not YAML: an escape names no character"


def test_an_alias_bomb_is_refused_at_its_first_anchor():
    assert complaint("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n").startswith("recipe.yaml:1: a: anchors (`&`)")


def test_the_variants_that_pydantic_adds_to_locations_are_known():
    assert complaint(SMALLEST + "adapter: {name: lora, lora: 1}\n") == (
        "recipe.yaml:10: adapter.lora: unknown key\nhint: the keys here are `name`, `rank`, `alpha`, `dropout`, `targets`, `parameters`, `exclude`, `layers`, `freeze`"
    )
    assert complaint(SMALLEST.replace("data:", "data:\n  holdout: [{path: 3}]")).startswith(
        "recipe.yaml:4: data.holdout[0].path: must be text, not `3`"
    )


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("{docs: [{pth: x}]}", "evaluate.sets.docs[0].pth: unknown key\nhint: did you mean `data.train[0].path`, "),
        ("{docs: {rows: [{path: x, takee: 3}]}}", "evaluate.sets.docs.rows[0].takee: unknown key\nhint: did you mean "),
        ("{docs: []}", "evaluate.sets.docs: must not be empty"),
        ("{'a b': [{path: x}]}", "evaluate.sets: `a b` cannot be the name of a set"),
        ("{held-out: [{path: x}]}", "evaluate.sets: `held-out` cannot be the name of a set"),
        ("{docs: {rows: [{path: x}], metrics: [bleu]}}", "evaluate.sets.docs.metrics[0].name: must be `exact_match`, "),
        (
            "{docs: {rows: [{path: x}], metrics: [{name: json, foo: 1}]}}",
            "evaluate.sets.docs.metrics[0].foo: unknown key",
        ),
        (
            "{docs: {rows: [{path: x}], metrics: [{name: regex, pattern: '('}]}}",
            "evaluate.sets.docs.metrics[0].pattern: is no",
        ),
        (
            "{docs: {rows: [{path: x}], metrics: [rouge, rouge]}}",
            "evaluate.sets.docs.metrics: must have each metric once",
        ),
        (
            "{docs: {rows: [{path: x}], metrics: [{name: loss, program: [a]}]}}",
            "evaluate.sets.docs.metrics[0].name: cannot",
        ),
    ],
)
def test_a_mistake_in_an_evaluation_set_is_named_by_its_key(sets, said):
    text = SMALLEST.replace("data:", "data:\n  holdout: 2") + f"evaluate: {{sets: {sets}}}\n"
    assert complaint(text).partition(": ")[2].startswith(said)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ("evaluate: {test_set: final}", "evaluate.test_set: needs its rows in `evaluate.sets`"),
        ("evaluate: {test_set: final, sets: {docs: [{path: x}]}}", "evaluate.test_set: must be `docs`"),
        ("evaluate: {test_set: held-out, sets: {docs: [{path: x}]}}", "evaluate.test_set: must be `docs`"),
        (
            "evaluate: {test_set: docs, sets: {docs: [{path: x}]}}\ncheckpoint: {keep: {best: {metric: docs/loss}}}",
            "checkpoint.keep.best.metric: nothing is chosen by `docs`, since it is `evaluate.test_set`; use another set",
        ),
        (
            "evaluate: {every: 2 steps, test_set: docs, sets: {docs: [{path: x}]}}",
            "train.early_stopping.metric: nothing is chosen by `docs`, since it is `evaluate.test_set`; use another set",
        ),
    ],
)
def test_nothing_is_chosen_by_the_test_set(sections, said):
    text = SMALLEST.replace("data:", "data:\n  holdout: 2") + sections + "\n"
    if said.startswith("train."):
        text = text.replace("train: {", "train: {early_stopping: {metric: docs/loss}, ")
    assert complaint(text).partition(": ")[2] == said


def test_a_recipe_made_in_python_is_held_to_the_same_rules():
    sections = loads(SMALLEST, "recipe.yaml").recipe.model_dump(exclude_unset=True) | {"package": {"form": "adapter"}}
    with pytest.raises(ValueError, match="package.form: `adapter` needs"):
        Recipe.model_validate(sections)


def test_a_broken_recipe_is_answered_without_importing_anything_heavy():
    code = f"""
import sys
from finetune.errors import RecipeError
from finetune.recipe.load import load
try:
    load({str(CORPUS / "recipes" / "several-problems.yaml")!r})
except RecipeError:
    print(*sorted({{"torch", "transformers", "datasets", "numpy", "huggingface_hub"}} & sys.modules.keys()))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("min_learning_rate: 1", "recipe.yaml:7: optimizer.min_learning_rate: 1 is above the peak, 0.0002"),
        ("min_learning_rate: 120%", "must be at most 100%, not `120%`"),
        ("min_learning_rate: low", "must be a rate like `2e-5` or a share like `10%`, not `low`"),
        ("schedule: constant, min_learning_rate: 1e-5", "min_learning_rate: has no meaning for `constant`"),
        ("decay: 10%", "optimizer.decay: has no meaning for `cosine`"),
        ("schedule: linear, timescale: 10", "optimizer.timescale: has no meaning for `linear`"),
    ],
)
def test_a_floor_or_a_key_that_the_schedule_cannot_have_is_refused(setting, message):
    text = SMALLEST.replace("optimizer:\n  learning_rate: 2e-4", f"optimizer: {{learning_rate: 2e-4, {setting}}}")
    assert message in complaint(text)
