"""A recipe becomes a plan with everything counted and held out as it says; what cannot work is refused with its line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.data import pack
from finetune.errors import BaseError, DataError, RecipeError, RunError
from finetune.model.base import load_tokenizer
from finetune.plan.memory import CPU_TOKENS
from finetune.plan.plan import ROW_RULES, Plan
from finetune.recipe.load import load
from finetune.training.encoding import template_and_encoding
from finetune.training.evaluation import batches
from finetune.training.resolve import resolve
from finetune.training.strategy.start import start_accelerator


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def rows_file(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def refusal(path, error=DataError, earlier=None):
    with pytest.raises(error) as caught:
        resolve(load(path), earlier)
    return str(caught.value)


def line_of(path, key):
    [line] = [
        number for number, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith(f"{key}:")
    ]
    return line


def drawn(recipe_file, chat_data, holdout, seed=0, split_seed=0):
    """Training rows and held-out rows of the 40 rows of the training file."""
    resolved = resolve(
        load(
            recipe_file(
                data={
                    "train": [{"path": str(chat_data / "train.jsonl")}],
                    "holdout": holdout,
                    "split_seed": split_seed,
                },
                train={"steps": 3, "batch_size": 6, "seed": seed},
            )
        )
    )
    return resolved, resolved.train.rows.tolist(), resolved.holdout.rows.tolist()


@pytest.mark.parametrize(("holdout", "count"), [(0, 0), (1, 1), (7, 7), (39, 39), ("0%", 0)])
def test_held_out_rows_are_as_many_as_asked_and_never_trained_on(recipe_file, chat_data, holdout, count):
    resolved, train, held_out = drawn(recipe_file, chat_data, holdout)
    assert len(held_out) == count
    assert sorted(train + held_out) == list(range(40))
    assert (resolved.plan.counts.rows, resolved.plan.holdout_counts.rows) == (40 - count, count)
    assert resolved.plan.sizes == (40 - count,) and resolved.plan.holdout == ()


def test_a_share_holds_out_about_so_many_rows(recipe_file, chat_data):
    """Each row by itself, so that rows which are added leave the others where they are."""
    assert 5 <= len(drawn(recipe_file, chat_data, "25%")[2]) <= 15


def test_held_out_rows_are_drawn_by_the_seed_of_the_split_and_not_by_that_of_the_training(recipe_file, chat_data):
    assert drawn(recipe_file, chat_data, 8)[2] == drawn(recipe_file, chat_data, 8, seed=1)[2]
    draws = [drawn(recipe_file, chat_data, 8, split_seed=seed)[2] for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3
    assert all(draw == sorted(set(draw)) for draw in draws)


def test_more_held_out_rows_keep_those_that_were_held_out_before(recipe_file, chat_data):
    """The larger draw holds the smaller one, so figures of both stay comparable."""
    assert set(drawn(recipe_file, chat_data, 5)[2]) < set(drawn(recipe_file, chat_data, 9)[2])


def test_held_out_rows_are_drawn_from_all_sources(recipe_file, chat_data):
    sources = [{"path": str(chat_data / name)} for name in ("train.jsonl", "holdout.jsonl")]
    resolved = resolve(load(recipe_file(data={"train": sources, "holdout": 24})))
    assert sorted([*resolved.train.rows, *resolved.holdout.rows]) == list(range(48))
    assert any(row >= 40 for row in resolved.holdout.rows) and any(row < 40 for row in resolved.holdout.rows)
    assert len(resolved.plan.sizes) == 2 and sum(resolved.plan.sizes) == 24


@pytest.mark.parametrize(("holdout", "count"), [(40, 40), (41, 41), ("100%", 40)])
def test_holding_out_every_row_is_refused(recipe_file, chat_data, holdout, count):
    path = recipe_file(data={"train": [{"path": str(chat_data / "train.jsonl")}], "holdout": holdout})
    assert refusal(path) == f"data.holdout takes {count} of 40 rows, so none is left to train on\nhint: hold out fewer"


def test_a_source_of_which_every_row_is_held_out_is_refused(recipe_file, chat_data, rows_file):
    sources = [{"path": str(chat_data / "train.jsonl")}, {"path": rows_file("one.jsonl", [chat("ask", "answer")])}]
    path = recipe_file(data={"train": sources, "holdout": "95%"}, train={"steps": 3, "batch_size": 2})
    assert refusal(path) == f"{path}: no row is left to train on\nhint: hold out fewer rows, or give more"


def test_a_holdout_of_its_own_is_counted_apart(recipe_file):
    resolved = resolve(load(recipe_file()))
    assert (len(resolved.train), len(resolved.holdout)) == (40, 8)
    assert [pin.rows for pin in (*resolved.plan.train, *resolved.plan.holdout)] == [40, 8]
    assert resolved.holdout.rows.tolist() == list(range(8))


def test_the_counts_are_those_of_the_examples(recipe_file, rows_file, tiny_tokenizer):
    answers = ["ok", "b" * 10, "c" * 200, "d"]
    rows = [chat("ask", answer) for answer in answers[:3]] + [chat("q" * 100, "d")]
    path = recipe_file(
        data={"train": [{"path": rows_file("rows.jsonl", rows)}]}, task={"name": "chat", "max_length": 64}
    )
    resolved = resolve(load(path))
    lengths = [len(tiny_tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows]
    header = len(tiny_tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True)["input_ids"])
    supervised = [len(tiny_tokenizer(answer)["input_ids"]) + 1 for answer in answers[:2]] + [64 - header]
    assert lengths[2] > 64 and lengths[3] > 64
    assert resolved.plan.counts.model_dump() == {
        "rows": 4,
        "examples": 3,
        "tokens": lengths[0] + lengths[1] + 64,
        "supervised_tokens": sum(supervised),
        "cut_rows": 1,
        "cut_tokens": lengths[2] - 64,
        "left_out_rows": 1,
        "longest": 64,
        "bad_rows": 0,
    }
    assert resolved.train.rows.tolist() == [0, 1, 2]
    assert resolved.plan.total_parameters > resolved.plan.trainable_parameters > 0


def test_a_long_text_is_several_examples_of_one_row(recipe_file, rows_file):
    rows = [{"text": "ab " * 60}, {"text": "the row"}]
    path = recipe_file(
        data={"train": [{"path": rows_file("text.jsonl", rows)}]}, task={"name": "text", "max_length": 32}
    )
    resolved = resolve(load(path))
    assert resolved.plan.counts.rows == 2 and resolved.plan.counts.examples == 5
    assert sorted(set(resolved.train.rows.tolist())) == [0, 1]
    assert resolved.plan.counts.cut_rows == 0 and resolved.plan.counts.longest == 32


@pytest.mark.parametrize(("epochs", "batch_size", "steps"), [(1, 6, 7), (3, 6, 21), (2, 40, 2), (2, 100, 2)])
def test_epochs_are_whole_passes_over_the_examples(recipe_file, epochs, batch_size, steps):
    plan = resolve(load(recipe_file(train={"epochs": epochs, "batch_size": batch_size}))).plan
    assert plan.steps == steps


def test_warm_up_is_a_count_or_a_share_of_the_steps(recipe_file):
    for warmup, expected in (("30%", 3), (4, 4), (99, 10), (0, 0)):
        plan = resolve(load(recipe_file(optimizer={"learning_rate": 0.01, "warmup": warmup}))).plan
        assert plan.warmup_steps == expected


def test_weighted_sources_are_drawn_by_their_weights(recipe_file, chat_data):
    sources = [
        {"path": str(chat_data / "train.jsonl"), "weight": 0.25},
        {"path": str(chat_data / "holdout.jsonl"), "weight": 0.75},
    ]
    resolved = resolve(load(recipe_file(data={"train": sources}, train={"epochs": 2, "batch_size": 8})))
    plan = resolved.plan
    assert plan.order.weights == (0.25, 0.75) and plan.sizes == (40, 8) and plan.steps == 12
    examples = np.concatenate([plan.order.examples_of(step) for step in range(1, plan.steps + 1)])
    assert (resolved.train.rows[examples] < 40).sum() == 24 and len(examples) == 96
    assert all((plan.order.examples_of(step) < 40).sum() == 2 for step in range(1, plan.steps + 1))


def test_a_padded_run_of_older_code_keeps_its_micro_batches(recipe_file):
    task = {"name": "chat", "max_length": 64, "packing": False}
    new = resolve(load(recipe_file(task=task)))
    older = Plan.model_validate_json(json.dumps({**new.plan.model_dump(mode="json"), "pads_least": False}))
    assert new.plan.pads_least and older.plan_id == new.plan.plan_id
    accelerator = start_accelerator(new.plan.recipe.train)
    arranged = {
        batches(each, each.train, accelerator).arrange for each in (new, resolve(load(recipe_file(task=task)), older))
    }
    assert arranged == {pack.padded, pack.filled}
    assert resolve(load(recipe_file(task=task)), like=older).plan.pads_least is False, "a branch goes the same way"


def test_the_encoding_changes_with_the_template_and_the_length_and_not_with_packing(recipe_file, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = str(tmp_path / "own.jinja")
    chats = [
        {},
        {"packing": False},
        {"max_length": 32},
        {"template": template},
        {"template": template, "packing": False},
    ]
    first, unpacked, shorter, templated, both = (
        resolve(load(recipe_file(task={"name": "chat", "max_length": 64} | task))).plan.encoding for task in chats
    )
    assert first == unpacked and templated == both
    assert len({first, shorter, templated}) == 3


def test_a_length_beyond_the_positions_of_the_base_is_refused_with_its_line(recipe_file):
    path = recipe_file(task={"name": "chat", "max_length": 256}, train={"steps": 3})
    assert refusal(path, RecipeError) == (
        f"{path}:{line_of(path, 'max_length')}: task.max_length: 256 is more than the base's 128 positions\n"
        "hint: shorten it, or set base.rope, like {rope_type: yarn, factor: 2}"
    )


def test_a_length_that_is_not_written_counts_at_its_section(recipe_file):
    path = recipe_file(task={"name": "chat"}, train={"steps": 3})
    assert refusal(path, RecipeError) == (
        f"{path}:{line_of(path, 'task')}: task.max_length: 1024 is more than the base's 128 positions\n"
        "hint: shorten it, or set base.rope, like {rope_type: yarn, factor: 8}"
    )


def test_all_that_base_and_recipe_cannot_do_together_is_said_at_once(recipe_file):
    path = recipe_file(task={"name": "chat", "max_length": 256}, train={"steps": 3}, package={"form": "adapter"})
    with pytest.raises(RecipeError) as caught:
        resolve(load(path))
    assert [problem.key for problem in caught.value.problems] == ["task.max_length", "package.form"]
    assert caught.value.problems[1].hint == "set base.origin to the Hub checkpoint it is equal to, or use `merged`"


def test_an_adapter_that_fits_nothing_is_a_problem_of_the_recipe_with_its_line(recipe_file):
    path = recipe_file(adapter={"name": "lora", "targets": ["c_attn"]})
    message = refusal(path, RecipeError)
    assert message.startswith(
        f"{path}:{line_of(path, 'targets')}: adapter.targets: no linear layer is called `c_attn`\nhint: "
    )


def test_a_bad_row_is_named_by_file_and_line(recipe_file, rows_file):
    file = rows_file("rows.jsonl", [chat("ask", "answer"), chat("ask", "")])
    assert (
        refusal(recipe_file(data={"train": [{"path": file}]}))
        == f"{file}:2: has an empty assistant turn\nhint: remove the row"
    )


def test_a_resumed_plan_is_the_same_plan(recipe_file):
    path = recipe_file()
    plan = resolve(load(path)).plan
    assert resolve(load(path), plan).plan == plan


def test_a_resumed_plan_takes_what_may_change(recipe_file):
    plan = resolve(load(recipe_file())).plan
    resumed = resolve(load(recipe_file(guard={"spike": "stop"}, checkpoint={"every": "1 step"})), plan).plan
    assert resumed.plan_id == plan.plan_id and resumed.recipe.guard.spike == "stop"


@pytest.mark.parametrize("schedule", ["continue", "restart"])
def test_a_resumed_plan_that_was_extended_is_the_same_plan(recipe_file, schedule):
    longer = load(recipe_file(train={"epochs": 3, "batch_size": 6}))
    plan = resolve(load(recipe_file(train={"epochs": 1, "batch_size": 6}))).plan
    plan = plan.extended(longer.recipe.train, 5, schedule)
    assert resolve(longer, plan).plan == plan


@pytest.mark.parametrize("edit", ["train", "holdout"])
def test_data_that_was_edited_since_the_start_is_refused_and_named(recipe_file, rows_file, edit):
    files = {name: rows_file(f"{name}.jsonl", [chat("ask", "answer")] * 4) for name in ("train", "holdout")}
    path = recipe_file(data={name: [{"path": file}] for name, file in files.items()})
    plan = resolve(load(path)).plan
    rows_file(f"{edit}.jsonl", [chat("ask", "answer")] * 3 + [chat("ask", "answes")])
    message = refusal(path, RunError, plan)
    assert message.startswith("what the run trains on has changed since it was planned:\n  ")
    assert message.endswith(
        "\nhint: restore the old files, or train on the new ones in a branch: `finetune branch RUN@STEP`"
    )
    [changed] = message.split("\n")[1:-1]
    assert changed.startswith(f"  {edit}") and "fingerprint" in changed
    old, new = getattr(plan, edit)[0].fingerprint, getattr(resolve(load(path)).plan, edit)[0].fingerprint
    assert old in changed and new in changed


def test_a_base_that_was_edited_since_the_start_is_refused(recipe_file, tiny_base, tmp_path):
    copied = shutil.copytree(tiny_base, tmp_path / "base")
    path = recipe_file(base={"checkpoint": str(copied)})
    plan = resolve(load(path)).plan
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert refusal(path, BaseError, plan) == (
        f"{copied}: is not what it was when the run was planned\nhint: restore it, or start a new run"
    )


def test_a_micro_batch_is_as_the_recipe_says_or_the_longest_example_doubled_while_it_is_of_use(recipe_file):
    def resolved(**train):
        return resolve(load(recipe_file(train={"steps": 1, **train})))

    assert resolved(micro_batch_tokens=100).micro_batch_tokens == 100
    automatic = resolved(batch_size=6)
    longest = automatic.plan.counts.longest
    assert automatic.micro_batch_tokens == 8 * longest  # the next power of two over the six rows of a step
    assert resolved(batch_size=1).micro_batch_tokens == longest
    assert 1024 < resolved(batch_size=1000).micro_batch_tokens <= CPU_TOKENS
    assert resolved(batch_size=6).plan.plan_id == resolved(batch_size=6, micro_batch_tokens=100).plan.plan_id


def test_a_run_keeps_the_row_rules_it_began_with_and_new_data_gets_the_new_ones(recipe_file, chat_data):
    path = recipe_file()
    plan = resolve(load(path)).plan
    before = plan.model_copy(update={"row_rules": 1})
    resumed = resolve(load(path), before.model_copy(update={"encoding": _encoding_of(path, 1)})).plan
    assert (plan.row_rules, resumed.row_rules) == (ROW_RULES, 1)
    assert resumed.encoding != plan.encoding
    other = recipe_file("other", data={"train": [{"path": str(chat_data / "train.jsonl")}]})
    assert resolve(load(other), like=before).plan.row_rules == ROW_RULES


def _encoding_of(path, row_rules):
    recipe = load(path).recipe
    directory = Path(recipe.base.checkpoint)
    return template_and_encoding(recipe.task, directory, load_tokenizer(directory), row_rules)[1]
