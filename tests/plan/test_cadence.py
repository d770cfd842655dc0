"""The best evaluation so far is committed, whoever asks and whenever; what was seen and not kept is said."""

import json

import pytest

from finetune.errors import CheckpointError
from finetune.plan import cadence, forecast, plan
from finetune.plan.retention import Saved
from finetune.recipe.load import load
from finetune.store.checkpoints import best
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.run import inspect, journal
from finetune.training.resolve import resolve
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Killed, killed

TRAIN = {"steps": 14, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}


@pytest.fixture
def overfits(recipe_file, tiny_sections, tmp_path):
    """A recipe that is best after two steps and evaluates every two of twelve; without a cadence of commits, as by default."""
    rows = [
        {"messages": [{"role": "user", "content": "the model"}, {"role": "assistant", "content": f"zq {n} xv kj 83"}]}
        for n in range(8)
    ]
    (tmp_path / "unlike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**checkpoint: object):
        return recipe_file(
            data=tiny_sections["data"] | {"holdout": [{"path": str(tmp_path / "unlike.jsonl")}]},
            adapter=None,
            optimizer={"learning_rate": 0.03, "schedule": "constant", "warmup": 0},
            train=TRAIN | {"steps": 12},
            evaluate={"every": "2 steps"},
            checkpoint=checkpoint or None,
        )

    return write


def evaluated(run) -> dict[int, float]:
    return {step: each["loss"] for step, each in journal.evaluations(journal.read(run)).items()}


def committed(run) -> list[int]:
    return [record["step"] for record in journal.read(run) if record.get("event") == "committed"]


def lowest(losses: dict[int, float]) -> int:
    return min((loss, -step) for step, loss in losses.items() if step)[1] * -1


def test_the_best_evaluation_is_committed_also_by_default(overfits, train, tmp_path) -> None:
    run = train(overfits(), tmp_path / "run")
    losses = evaluated(run)
    assert lowest(losses) == 2 and losses[12] > losses[2] + 1
    assert find(parse(f"{run}@best")).step == lowest(losses)
    assert committed(run) == [2, 12] == [checkpoint.step for checkpoint in Store(run).checkpoints()]


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 8])
def test_a_killed_run_commits_the_same_bests_and_the_disk_is_bounded(recipe_file, train, tmp_path, after) -> None:
    recipe = recipe_file(evaluate={"every": "2 steps"}, checkpoint={"every": "5 steps"}, train=TRAIN)
    whole = train(recipe, tmp_path / "whole")
    losses = evaluated(whole)
    so_far = [step for step in losses if step and losses[step] <= min(losses[at] for at in losses if 0 < at <= step)]
    assert len(so_far) > 3 and committed(whole) == sorted({*so_far, 5, 10, 14})
    kept = {checkpoint.step for checkpoint in Store(whole).checkpoints()}
    assert kept == {*committed(whole)[-2:], lowest(losses)}  # `keep.last` and the best
    with killed(after=after), pytest.raises(Killed):
        train(recipe, tmp_path / "killed")
    resumed = train(recipe, tmp_path / "killed")
    assert [item.step for item in Store(resumed).checkpoints()] == [item.step for item in Store(whole).checkpoints()]
    assert_same_run(whole, resumed)


def test_the_rule_counts_what_is_evaluated_up_to_the_step_alone(overfits) -> None:
    made = resolve(load(overfits(), ())).plan
    losses = {0: 1.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: float("nan"), 12: 2.0}
    figures = {step: {"loss": loss} for step, loss in losses.items()}
    assert [step for step in losses if step and cadence.is_saved_as_best(made, step, figures)] == [2, 4, 8, 12]
    assert not cadence.is_saved_as_best(made, 14, figures)
    three = resolve(load(overfits(keep={"best": 3}), ())).plan
    assert [step for step in losses if step and cadence.is_saved_as_best(three, step, figures)] == [2, 4, 6, 8, 12]


def test_each_evaluation_may_cost_a_save_unless_that_is_switched_off(overfits) -> None:
    kept = {"every": "5 steps", "keep": {"weights_every": "6 steps"}}
    cadences = {
        is_on: list(map(str, cadence.saves_at_most(load(overfits(save_best=is_on, **kept), ()).recipe)))
        for is_on in (True, False)
    }
    assert cadences == {True: ["5 steps", "6 steps", "2 steps"], False: ["5 steps", "6 steps"]}


def test_a_branch_counts_from_the_step_that_it_begins_with(overfits) -> None:
    made = resolve(load(overfits(), ())).plan
    parent = plan.Parent(ref="a@6", run="r", step=6, digest=None, plan_id="p")
    figures = {2: {"loss": 1.0}, 6: {"loss": 3.0}, 8: {"loss": 2.0}}
    branched = made.model_copy(update={"parent": parent})
    assert cadence.is_saved_as_best(branched, 8, figures) and not cadence.is_saved_as_best(made, 8, figures)


@pytest.mark.slow
def test_where_it_is_switched_off_plan_warns_and_best_and_log_name_the_better_step(
    overfits, train, tmp_path, capsys
) -> None:
    warning = "checkpoint.save_best is false, and evaluations come every 2 steps: the best one may not be committed"
    assert forecast.warnings(resolve(load(overfits(save_best=False), ())).plan) == [warning]
    for covered in ({"every": "2 steps"}, {"every": ["1 step", "5 minutes"]}, {"keep": {"weights_every": "1 step"}}):
        assert forecast.warnings(resolve(load(overfits(save_best=False, **covered), ())).plan) == []
    assert forecast.warnings(resolve(load(overfits(), ())).plan) == []
    run = train(overfits(save_best=False), tmp_path / "run")
    losses = evaluated(run)
    step = lowest(losses)
    assert committed(run) == [12]
    note = f"step {step} had held-out loss {losses[step]:.4f} and was not kept; the best commit is step 12, at {losses[12]:.4f}"
    assert f"warning: {note}\n" in capsys.readouterr().err
    assert find(parse(f"{run}@best")).step == 12
    find(parse(f"{run}@best"))
    assert capsys.readouterr().err.count(f"warning: {run}: {note}\n") == 1
    facts = inspect.log(run)
    assert note in facts["notes"] and f"! {note}" in inspect.tree(facts)


def test_a_best_that_is_worse_than_the_base_is_said(overfits, train, tmp_path, capsys) -> None:
    recipe = overfits()
    run = train(recipe, tmp_path / "run", "evaluate.every=12 steps")
    losses = evaluated(run)
    step = lowest(losses)
    assert losses[step] > losses[0]
    note = f"the best commit, step {step}, is worse than the base: held-out loss {losses[step]:.4f}, the base has {losses[0]:.4f}"
    assert f"warning: {note}\nfinished at step 12\n" in capsys.readouterr().err
    train(recipe, run, "evaluate.every=12 steps")
    assert capsys.readouterr().err == "resumed from step 12\nfinished at step 12\n"
    assert note in inspect.tree(inspect.log(run))


def test_notes_are_about_what_the_run_could_commit() -> None:
    figures = {0: {"loss": 2.0}, 4: {"loss": 1.0}, 8: {"loss": 1.5}}
    assert best.notes([Saved(8, {"loss": 1.5})], figures, 1) == [
        "step 4 had held-out loss 1.0000 and was not kept; the best commit is step 8, at 1.5000"
    ]
    assert best.notes([Saved(8, {"loss": 1.5})], figures, 8) == []
    assert best.notes([Saved(8, {})], figures, 1) == ["step 4 had held-out loss 1.0000 and was not kept"]
    assert best.notes([], {}, 1) == best.notes([Saved(8, {"loss": "nan"})], {8: {"loss": "nan"}}, 1) == []
    assert best.first_step([{"event": "started", "step": 0}, {"event": "branched", "step": 8}]) == 8


def test_without_held_out_rows_the_answer_names_them(recipe_file, tiny_sections, train, tmp_path) -> None:
    data = {"train": tiny_sections["data"]["train"]}
    run = train(recipe_file(data=data), tmp_path / "run", "train.steps=2")
    with pytest.raises(CheckpointError, match="has no evaluated checkpoint") as caught:
        find(parse(f"{run}@best"))
    assert "no held-out rows" in caught.value.hint and "data.holdout" in caught.value.hint
    assert "evaluate.every" not in caught.value.hint
