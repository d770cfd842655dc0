"""A plan's id stands for all that decides what is trained, and for nothing else; what is loaded is what was written."""

import json

import pytest

from finetune.errors import RunError
from finetune.plan.plan import EarlierOrder, Plan
from finetune.recipe.load import load
from finetune.recipe.schema import Train
from finetune.store.run.directory import RunDirectory
from finetune.training.resolve import resolve


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
        ("schedule_start", 4),
        ("segments", [{"until": 4, "plan_id": "blake3:00", "steps": 8, "warmup_steps": 0}]),
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
        ("recipe.train.reproducibility", "elastic"),
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
    loaded, loaded_facts = RunDirectory(tmp_path).plan()
    assert loaded == plan and loaded_facts == facts
    assert loaded.plan_id == plan.plan_id
    assert loaded.dump(loaded_facts) == plan.dump(facts)
    assert not {"segments", "schedule_start"} & json.loads(plan.dump(facts)).keys()


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
    assert RunDirectory(tmp_path).plan()[0] == plan


# As version 0.1 wrote it: runs of that time go on only while this plan keeps its id.
EARLY = {
    "recipe": {
        "base": {"checkpoint": "owner/name"},
        "task": {"name": "chat", "max_length": 64},
        "data": {"train": [{"path": "rows.jsonl"}], "holdout": 2},
        "adapter": {"name": "lora", "rank": 4},
        "optimizer": {"learning_rate": 0.01, "warmup": 2},
        "train": {"steps": 10, "batch_size": 6, "micro_batch_tokens": 128},
        "evaluate": {"every": "5 steps"},
        "checkpoint": {"every": "4 steps"},
        "guard": {"spike": "stop"},
        "package": {"dtype": "fp32"},
        "publish": {"repo": "owner/name"},
    },
    "base": {"kind": "hub", "revision": "0" * 40, "digest": None},
    "train": [{"name": "rows.jsonl", "revision": None, "fingerprint": "blake3:00", "rows": 10}],
    "holdout": [],
    "encoding": "sha256:00",
    "counts": {
        "rows": 8,
        "examples": 8,
        "tokens": 80,
        "supervised_tokens": 40,
        "cut_rows": 0,
        "cut_tokens": 0,
        "left_out_rows": 0,
        "longest": 12,
    },
    "sizes": [8],
    "steps": 10,
    "warmup_steps": 2,
    "total_parameters": 100,
    "trainable_parameters": 10,
}
EARLY["holdout_counts"] = EARLY["counts"] | {"rows": 2}


def test_a_plan_keeps_the_id_that_an_earlier_version_gave_it():
    early = Plan.model_validate_json(json.dumps(EARLY))
    assert early.plan_id == "blake3:d44720f7eea4a22d46c0f3f2a3b8ae1fa74bf596a26500a6ef7580122dd5b4fa"


def falling(**changes):
    """A plan of 10 steps, one of them warm-up, on a linear schedule."""
    record = EARLY | {"warmup_steps": 1}
    optimizer = {"learning_rate": 1.0, "schedule": "linear", "warmup": "10%"}
    record["recipe"] = record["recipe"] | {"optimizer": optimizer | changes}
    return Plan.model_validate_json(json.dumps(record))


def longer(plan, steps, recorded, schedule):
    return plan.extended(Train(steps=steps, batch_size=6, micro_batch_tokens=128), recorded, schedule)


def rates(plan, first=1, last=None):
    return [plan.learning_rate(step) for step in range(first, (plan.steps if last is None else last) + 1)]


@pytest.mark.parametrize("schedule", ["continue", "restart"])
@pytest.mark.parametrize("recorded", [0, 1, 7, 10])
def test_recorded_steps_keep_their_learning_rates(recorded, schedule):
    plan = falling()
    extended = longer(plan, 30, recorded, schedule)
    assert extended.steps == 30 and extended.recipe.train.steps == 30
    assert rates(extended, 1, recorded) == rates(plan, 1, recorded)


def test_a_continued_schedule_is_that_of_a_plan_which_was_longer_from_the_start():
    extended = longer(falling(), 30, 7, "continue")
    whole = falling().model_copy(update={"steps": 30, "warmup_steps": 3})
    assert extended.warmup_steps == 3 and rates(extended, 8) == rates(whole, 8)


def test_a_restarted_schedule_is_that_of_a_plan_of_the_added_steps():
    extended = longer(falling(), 30, 10, "restart")
    added = falling().model_copy(update={"steps": 20, "warmup_steps": 2})
    assert extended.warmup_steps == 2 and rates(extended, 11) == rates(added)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "cosine", "min_learning_rate": "10%"},
        {"schedule": "wsd", "decay": 4, "min_learning_rate": 0.1},
        {"schedule": "wsd", "decay": "30%", "decay_shape": "sqrt"},
        {"schedule": "inverse_sqrt", "timescale": 3},
    ],
)
def test_a_schedule_with_keys_is_extended_and_branched_as_one_without(changes):
    plan = falling(**changes)
    whole = falling(**changes).model_copy(update={"steps": 30, "warmup_steps": 3})
    continued, restarted = longer(plan, 30, 7, "continue"), longer(plan, 30, 10, "restart")
    assert rates(continued, 1, 7) == rates(plan, 1, 7) and rates(continued, 8) == rates(whole, 8)
    added = falling(**changes).model_copy(update={"steps": 20, "warmup_steps": 2})
    assert rates(restarted, 1, 10) == rates(plan) and rates(restarted, 11) == rates(added)
    # twice the batch size after step 4: the remaining steps take the rest of the curve
    change = EarlierOrder(until=4, drawn=24, seed=0, batch_size=6, steps=10)
    branch = plan.model_copy(update={"earlier_orders": (change,), "steps": 7})
    assert rates(branch, 1, 4) == rates(plan, 1, 4)
    assert rates(branch, 5) == pytest.approx([plan.learning_rate(step) for step in (6, 8, 10)], rel=1e-9)


def test_a_warm_up_that_is_a_count_stays_one():
    assert longer(falling(warmup=4), 30, 10, "restart").warmup_steps == 4
    assert longer(falling(warmup=4), 13, 10, "restart").warmup_steps == 3


def test_a_plan_is_extended_more_than_once():
    plan = falling()
    second = longer(plan, 20, 10, "restart")
    third = longer(second, 40, 15, "continue")
    assert third.schedule_start == 10 and third.warmup_steps == 3
    assert rates(third, 1, 10) == rates(plan) and rates(third, 11, 15) == rates(second, 11, 15)
    restarted_longer = falling().model_copy(update={"steps": 30, "warmup_steps": 3})
    assert rates(third, 16) == rates(restarted_longer, 6)
    assert third.plan_ids == {plan.plan_id, second.plan_id, third.plan_id} and len(third.plan_ids) == 3


def test_a_plan_that_is_extended_twice_at_one_step_follows_the_last_wish():
    plan = falling()
    second = longer(plan, 20, 10, "restart")
    third = longer(second, 40, 10, "restart")
    assert rates(third, 1, 10) == rates(plan)
    assert rates(third, 11) == rates(longer(plan, 40, 10, "restart"), 11)
    assert second.plan_id in third.plan_ids


def test_a_longer_run_draws_the_same_rows(plan):
    weighted = changed(plan, "sizes", [40, 8])
    sources = [weighted.recipe.data.train[0].model_copy(update={"weight": weight}) for weight in (0.25, 0.75)]
    data = weighted.recipe.data.model_copy(update={"train": sources})
    weighted = weighted.model_copy(update={"recipe": weighted.recipe.model_copy(update={"data": data})})
    for short in (plan, weighted):
        extended = short.extended(Train(epochs=5, batch_size=6), 9, "restart")
        assert extended.steps == 5 * short.order.steps_per_epoch
        for step in range(1, 3 * short.order.steps_per_epoch):  # beyond the first epoch and the old end
            assert extended.order.examples_of(step).tolist() == short.order.examples_of(step).tolist()


@pytest.mark.parametrize(("schedule", "start"), [("continue", 0), ("restart", 7)])
def test_a_longer_plan_says_how_it_came_about_and_is_read_back(schedule, start, tmp_path):
    plan = falling()
    assert plan.extension is None and plan.plan_ids == {plan.plan_id}
    extended = longer(plan, 30, 7, schedule)
    assert extended.extension == {
        "step": 7,
        "steps": [10, 30],
        "schedule": schedule,
        "plan_id": extended.plan_id,
    }
    assert extended.schedule_start == start
    (tmp_path / "plan.json").write_bytes(extended.dump({}))
    assert RunDirectory(tmp_path).plan()[0] == extended


def test_a_segment_that_was_edited_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(longer(falling(), 30, 7, "continue").dump({}).replace(b'"until": 7', b'"until": 8'))
    assert refusal(tmp_path).startswith(f"{path}: does not have the content its plan_id stands for")


def refusal(directory):
    with pytest.raises(RunError) as caught:
        RunDirectory(directory).plan()
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
