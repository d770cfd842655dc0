"""A plan's id stands for all that decides what is trained, and for nothing else; what is loaded is what was written."""

import json

import pytest

from finetune import plan as plans
from finetune.errors import RunError
from finetune.plan import Plan
from finetune.recipe.load import load
from finetune.resolve import resolve


@pytest.fixture
def plan(recipe_file):
    return resolve(load(recipe_file())).plan


def changed(plan, key, value):
    """The plan with one field changed, by its dotted name."""
    record = plan.model_dump(mode="json")
    *sections, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    section = record
    for part in sections:
        section = section[part]
    assert section[last] != value
    section[last] = value
    return Plan.model_validate(record)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base.digest", "blake3:00"),
        ("base.revision", "main"),
        ("train.0.fingerprint", "blake3:00"),
        ("train.0.rows", 41),
        ("holdout.0.fingerprint", "blake3:00"),
        ("encoding", "sha256:00"),
        ("counts.tokens", 1),
        ("sizes", [39]),
        ("steps", 11),
        ("warmup_steps", 2),
        ("total_parameters", 1),
        ("trainable_parameters", 1),
        ("recipe.base.checkpoint", "owner/name"),
        ("recipe.task.max_length", 63),
        ("recipe.task.packing", False),
        ("recipe.task.template", "own.jinja"),
        ("recipe.data.train.0.weight", 1.0),
        ("recipe.data.train.0.columns", {"messages": "conversations"}),
        ("recipe.adapter", None),
        ("recipe.adapter.rank", 8),
        ("recipe.adapter.dropout", 0.0),
        ("recipe.adapter.targets", ["q_proj"]),
        ("recipe.optimizer.name", "sgd"),
        ("recipe.optimizer.learning_rate", 0.011),
        ("recipe.optimizer.schedule", "linear"),
        ("recipe.optimizer.weight_decay", 0.1),
        ("recipe.optimizer.betas", [0.9, 0.95]),
        ("recipe.optimizer.max_grad_norm", 2.0),
        ("recipe.train.steps", 11),
        ("recipe.train.batch_size", 5),
        ("recipe.train.seed", 1),
        ("recipe.train.precision", "bf16"),
        ("recipe.train.reproducibility", "fast"),
    ],
)
def test_the_id_changes_with_what_decides_training(plan, key, value):
    assert changed(plan, key, value).plan_id != plan.plan_id


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe.evaluate.every", "5 steps"),
        ("recipe.checkpoint.every", ["1 minute"]),
        ("recipe.checkpoint.keep.last", 5),
        ("recipe.guard.spike", "stop"),
        ("recipe.package.dtype", "bf16"),
        ("recipe.publish", {"repo": "owner/name"}),
        ("recipe.train.micro_batch_tokens", 256),
    ],
)
def test_the_id_does_not_change_with_what_may_change_on_resume(plan, key, value):
    assert changed(plan, key, value).plan_id == plan.plan_id


def test_the_id_is_that_of_the_content_not_of_the_object(plan, recipe_file):
    again = resolve(load(recipe_file("another-name"))).plan
    assert again is not plan and again.plan_id == plan.plan_id
    assert plan.plan_id.startswith("blake3:") and len(plan.plan_id) == 7 + 64


def test_a_plan_that_was_written_is_read_back_with_its_facts(plan, tmp_path):
    facts = {"versions": {"torch": "2"}, "threads": 1}
    (tmp_path / "plan.json").write_bytes(plan.dump(facts))
    loaded, loaded_facts = plans.load(tmp_path)
    assert loaded == plan and loaded_facts == facts
    assert loaded.plan_id == plan.plan_id
    assert loaded.dump(loaded_facts) == plan.dump(facts)


def test_a_plan_with_every_section_is_read_back(recipe_file, chat_data, tmp_path):
    path = recipe_file(
        data={
            "train": [{"path": str(chat_data / "train.jsonl"), "weight": 0.3, "columns": {"messages": "messages"}}],
            "holdout": "10%",
        },
        adapter={"name": "frozen", "freeze": "model.embed_tokens.*"},
        evaluate={"every": "5 steps"},
        checkpoint={"every": ["2 steps", "1.5 minutes"], "keep": {"last": 3, "best": 1, "every": "4 steps"}},
        publish={"repo": "owner/name"},
        optimizer={"learning_rate": 1e-3, "betas": [0.8, 0.9], "warmup": "10%"},
    )
    plan = resolve(load(path)).plan
    (tmp_path / "plan.json").write_bytes(plan.dump({}))
    assert plans.load(tmp_path)[0] == plan


def refusal(directory):
    with pytest.raises(RunError) as caught:
        plans.load(directory)
    return str(caught.value)


def test_an_edited_plan_is_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(plan.dump({}).replace(b'"learning_rate": 0.01', b'"learning_rate": 0.02'))
    assert refusal(tmp_path) == (
        f"{path}: does not have the content its plan_id stands for\nhint: it was edited: restore it from a copy"
    )


def test_a_plan_of_a_newer_version_is_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(plan.dump({})) | {"schema": 2, "new_field": 1}))
    assert refusal(tmp_path) == f"{path}: was written by a newer version of finetune\nhint: upgrade finetune"


def test_a_directory_without_a_plan_is_not_a_run(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: is not a run directory: it has no plan.json\nhint: start it with `finetune train`"
    )


def test_a_torn_plan_is_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(plan.dump({})[:-100])
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: is damaged: ")
    assert message.endswith("\nhint: restore it from a copy, or start a new run")


@pytest.mark.parametrize("spoil", ["facts", "plan_id", "steps", "surplus", "null"])
def test_a_plan_with_fields_too_few_or_too_many_is_refused(plan, tmp_path, spoil):
    record = json.loads(plan.dump({}))
    if spoil == "surplus":
        record["surplus"] = 1
    elif spoil == "null":
        record = None
    else:
        del record[spoil]
    (tmp_path / "plan.json").write_text(json.dumps(record))
    assert refusal(tmp_path).startswith(str(tmp_path / "plan.json"))


def test_the_order_and_the_learning_rate_are_those_of_the_recipe(plan):
    assert plan.order.sizes == (40,) and plan.order.weights is None and plan.order.batch_size == 6
    assert plan.warmup_steps == 0 and plan.learning_rate(1) == 0.01
    assert len({tuple(plan.order.examples_of(step)) for step in range(1, 8)}) == 7
    weighted = changed(plan, "recipe.data.train.0.weight", 2.0)
    assert weighted.order.weights == (2.0,)
