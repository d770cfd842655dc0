"""What a run directory and a recipe make together: a new plan, the run's own, a longer one, or a refusal that names each difference."""

import json
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import DataError, RunError
from finetune.plan.memory import Device
from finetune.recipe.load import load
from finetune.recipe.resume_rules import FACT_NAMES
from finetune.store.run.journal import Journal
from finetune.training import resolve as resolving
from finetune.training.resume import open_plan

CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


@pytest.fixture
def opened(recipe_file, tmp_path):
    """A function that opens the run with a recipe's changes and writes its plan down, as the recorder does."""
    run = tmp_path / "run"
    run.mkdir()

    def open_run(*overrides, schedule=None, accelerator=CPU, sections=None):
        resolved, facts, changes = open_plan(
            load(recipe_file(**(sections or {})), overrides), run, accelerator, schedule
        )
        (run / "plan.json").write_bytes(resolved.plan.dump(facts))
        return resolved.plan, facts, changes

    open_run.path = run
    return open_run


def record_steps(run, last):
    journal = Journal(run)
    for step in range(1, last + 1):
        journal.append({"kind": "step", "step": step})
    journal.close()


def refusal(opened, *overrides, **options):
    before = (opened.path / "plan.json").read_bytes()
    with pytest.raises(RunError) as caught:
        opened(*overrides, **options)
    assert (opened.path / "plan.json").read_bytes() == before
    return str(caught.value)


def test_an_unchanged_recipe_finds_the_plan_of_the_run(opened):
    plan, facts, _ = opened()
    assert opened() == (plan, facts, [])
    assert facts.keys() == {"run", "software", *FACT_NAMES} - {"hosts"}  # a fact of `hsdp` alone


def test_a_run_that_did_not_record_how_much_is_updated_at_once_had_the_slices_of_its_time(opened):
    plan, facts, _ = opened()
    assert facts.pop("update_slice") == 2**20
    (opened.path / "plan.json").write_bytes(plan.dump(facts))
    assert opened()[2] == []
    (opened.path / "plan.json").write_bytes(plan.dump(facts | {"update_slice": 2**26}))
    assert opened()[2] == ["update_slice changed: 67108864 -> 1048576; bit equality may be lost"]


def test_what_is_taken_is_said_with_both_values_and_what_is_refused_is_named_alone(opened):
    plan, _, _ = opened()
    again, _, changes = opened("guard.spike=stop", "checkpoint.keep.last=5")
    assert changes == [
        "taken from the recipe: checkpoint.keep.last: 2 -> 5",
        "taken from the recipe: guard.spike: warn -> stop",
    ]
    assert again.plan_id == plan.plan_id and again.recipe.guard.spike == "stop"
    message = refusal(opened, "guard.spike=ignore", "train.seed=4", "train.steps=20", "optimizer.learning_rate=0.5")
    assert message == (
        f"{opened.path}: was started with another recipe:\n  optimizer.learning_rate: 0.01 -> 0.5\n  train.seed: 0 -> 4\n"
        f"hint: use another --run, or go on from a step of this one with `finetune branch {opened.path}@STEP --set KEY=VALUE`"
    )


def test_facts_that_differ_are_said_with_both_values_and_never_refused(opened, monkeypatch):
    opened()
    monkeypatch.setattr("finetune.training.facts.version", lambda package: "0" if package == "peft" else "1")
    _, facts, changes = opened(accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=2))
    assert "world_size changed: 1 -> 2; bit equality may be lost" in changes
    assert any(line.startswith("versions.peft changed: ") and " -> 0; bit equality" in line for line in changes)
    assert facts["world_size"] == 2 and opened()[2]  # said once, and again when it changes back


def test_a_run_is_extended_from_its_newest_recorded_step(opened):
    plan, _, _ = opened()
    record_steps(opened.path, 7)
    longer, _, changes = opened("train.steps=20")
    assert changes == ["extended after step 7 (--schedule continue): train.steps: 10 -> 20"]
    assert (longer.steps, longer.segments[0].until, longer.segments[0].plan_id) == (20, 7, plan.plan_id)
    assert opened("train.steps=20")[::2] == (longer, [])


def test_epochs_extend_a_run_too(opened):
    sections = {"train": {"epochs": 1, "batch_size": 6, "precision": "fp32"}}
    assert opened(sections=sections)[0].steps == 7
    longer, _, changes = opened("train.epochs=3", schedule="restart", sections=sections)
    assert (longer.steps, changes) == (21, ["extended after step 0 (--schedule continue): train.epochs: 1 -> 3"])


def test_what_is_taken_and_an_extension_come_together(opened):
    opened()
    longer, _, changes = opened("train.steps=12", "train.micro_batch_tokens=256", "publish.repo=owner/name")
    assert [line.partition(":")[0] for line in changes] == [
        "taken from the recipe",
        "taken from the recipe",
        "extended after step 0 (--schedule continue)",
        "micro_batch_tokens changed",
    ]
    assert (longer.recipe.train.micro_batch_tokens, longer.recipe.publish.repo) == (256, "owner/name")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["train.steps=6"], ["train.steps: 10 -> 6"]),
        (["train.steps=9"], ["train.steps: 10 -> 9"]),
        (["train.steps=null", "train.epochs=9"], ["train.epochs: None -> 9", "train.steps: 10 -> None"]),
    ],
)
def test_a_run_gets_neither_shorter_nor_another_kind_of_length(opened, overrides, lines):
    opened()
    record_steps(opened.path, 8)
    reason = "(a run can be extended, in the key that gave its length, and never shortened)"
    assert refusal(opened, *overrides).splitlines()[1:-1] == [f"  {line} {reason}" for line in lines]


def test_the_recipe_from_before_an_extension_is_refused(opened):
    opened()
    opened("train.steps=20")
    assert "\n  train.steps: 20 -> 10 (" in refusal(opened)


def test_rows_that_changed_are_refused_for_an_extension_as_well(opened, tmp_path, chat_data):
    rows = (chat_data / "train.jsonl").read_text()
    file = tmp_path / "rows.jsonl"
    file.write_text(rows)
    sections = {"data": {"train": [{"path": str(file)}]}}
    opened(sections=sections)
    file.write_text(rows.replace("the", "teh", 1))
    message = refusal(opened, "train.steps=20", sections=sections)
    assert (
        message.startswith("what the run trains on has changed since it was planned:\n  ") and "fingerprint" in message
    )


@pytest.mark.parametrize("schedule", ["continue", "restart"])
def test_a_schedule_without_an_extension_is_refused(opened, schedule):
    hint = "hint: raise train.epochs or train.steps to extend a run, or leave --schedule out"
    with pytest.raises(RunError) as caught:
        opened(schedule=schedule)
    assert str(caught.value) == (
        f"{opened.path}: --schedule {schedule} has nothing to decide: there is no run yet that could be extended\n{hint}"
    )
    opened()
    assert refusal(opened, schedule=schedule) == (
        f"{opened.path}: --schedule {schedule} has nothing to decide: the recipe asks for the 10 steps that the run has\n{hint}"
    )


@pytest.mark.parametrize(("schedule", "other"), [("continue", "restart"), ("restart", "continue")])
def test_the_command_that_extended_a_run_may_be_repeated(opened, schedule, other):
    opened()
    record_steps(opened.path, 8)
    longer, _, _ = opened("train.steps=20", schedule=schedule)
    record_steps(opened.path, 12)
    assert opened("train.steps=20", schedule=schedule)[0] == opened("train.steps=20")[0] == longer
    assert f"--schedule {other} has nothing to decide" in refusal(opened, "train.steps=20", schedule=other)


def test_the_micro_batch_of_auto_is_decided_once_and_kept_on_another_machine(opened, monkeypatch):
    automatic = {"train": {"steps": 10, "batch_size": 6, "precision": "fp32"}}
    _, facts, _ = opened(sections=automatic)
    monkeypatch.setattr("finetune.plan.memory.machine_bytes", lambda: 2**20)
    _, again, changes = opened(sections=automatic)
    assert (again["micro_batch_tokens"], changes) == (facts["micro_batch_tokens"], [])
    _, named, _ = opened("train.micro_batch_tokens=100", sections=automatic)
    assert named["micro_batch_tokens"] == 100
    _, afresh, changes = opened(sections=automatic)
    assert afresh["micro_batch_tokens"] < facts["micro_batch_tokens"]
    assert changes[-1] == f"micro_batch_tokens changed: 100 -> {afresh['micro_batch_tokens']}; bit equality may be lost"


def test_a_run_of_older_row_rules_goes_on_and_says_what_they_lose(opened, tmp_path, monkeypatch):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "ask"},
                {"role": "assistant", "content": "yes", "thinking": "hm"},
            ]
        },
        {"prompt": "ask", "completion": "yes", "system": "be brief"},
        {"prompt": "ask", "completion": "yes", "id": 3},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"data": {"train": [{"path": str(file)}]}}
    with pytest.raises(DataError, match="the rendered text lacks `messages\\[1\\].thinking`"):
        opened(sections=sections)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.training.encoding.ROW_RULES", 1)  # as the run began
        plan, _, _ = opened(sections=sections)
    resumed, _, changes = opened(sections=sections)
    assert resumed == plan
    assert changes[0] == (
        "rows are read by the rules that the run began with; today's rules differ for 2 of the first 3: "
        f"{file}:1: the rendered text lacks `messages[1].thinking`"
    )


def test_a_run_planned_on_a_gpu_keeps_a_base_in_bf16_wherever_it_goes_on(opened, monkeypatch):
    def plan_on(is_gpu, **train):
        monkeypatch.setattr(resolving, "device", lambda: Device(80 * 2**30, is_gpu=is_gpu))
        sections = {"train": {"steps": 10, "batch_size": 6, "micro_batch_tokens": 128, "precision": "bf16"} | train}
        return opened(sections=sections)

    plan, _, _ = plan_on(True)
    assert plan.recipe.train.weights == "bf16"
    again, _, changes = plan_on(False)
    assert (again.plan_id, changes) == (plan.plan_id, [])
    longer, _, [change] = plan_on(False, steps=12)
    assert longer.recipe.train.weights == "bf16" and change.startswith("extended after step 0")
    with pytest.raises(RunError, match="train.weights: bf16 -> fp32"):
        plan_on(True, weights="fp32")


def test_a_run_planned_on_a_cpu_or_by_older_code_keeps_its_base_in_fp32_on_a_gpu(opened, monkeypatch):
    sections = {"train": {"steps": 10, "batch_size": 6, "micro_batch_tokens": 128, "precision": "bf16"}}
    plan, _, _ = opened(sections=sections)
    assert plan.recipe.train.weights == "fp32"
    monkeypatch.setattr(resolving, "device", lambda: Device(80 * 2**30, is_gpu=True))
    again, _, changes = opened(sections=sections)
    assert (again.plan_id, changes) == (plan.plan_id, [])


@pytest.mark.parametrize(
    "sections", [{"adapter": None}, {"train": {"steps": 10, "batch_size": 6, "precision": "fp32"}}]
)
def test_weights_are_in_bf16_by_default_only_under_an_adapter_and_with_bf16_products(opened, monkeypatch, sections):
    monkeypatch.setattr(resolving, "device", lambda: Device(80 * 2**30, is_gpu=True))
    plan, _, _ = opened(sections=sections)
    assert plan.recipe.train.weights == "fp32"
