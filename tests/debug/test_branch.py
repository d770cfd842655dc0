"""Runs that begin at a step of another one: what is linked, what is another way, and what stays the same to the bit."""

import json
import os
import sys

import pytest

from finetune.debug import branch_directory
from finetune.debug.bisect import bisect
from finetune.debug.branch import Choices, branch, row_ids
from finetune.debug.replay import replay
from finetune.errors import CheckpointError, DataError, RecipeError, RunError
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.inspect import problems
from tests import forks
from tests.conftest import chat_row
from tests.stories.poison import poison, rows_with_marks
from tests.stories.same_run import _of_directories

TRAIN = {"steps": 20, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 512}


@pytest.fixture
def run(recipe_file, train_once, tmp_path):
    return train_once(recipe_file(train=TRAIN, checkpoint={"every": "8 steps", "keep": {"last": 9}}), tmp_path / "run")


def records(run):
    return journal.steps(journal.read(run))


@pytest.mark.slow
def test_a_run_that_may_not_be_written_can_be_branched_off(run, capsys) -> None:
    (run / "pins").write_text("in the way")  # root may write everywhere else
    made = branch(f"{run}@8", None, Choices(), until=9)
    said = [line for line in capsys.readouterr().err.splitlines() if "pinned" in line]
    assert len(said) == 1 and said[0].startswith("run@8 could not be pinned, so its run may prune it: ")
    assert max(records(made)) == 9


@pytest.mark.slow
def test_a_branch_with_nothing_changed_goes_the_same_way(run) -> None:
    made = branch(f"{run}@8", None, Choices())
    assert made.name == "run-8"
    assert [item.step for item in Store(made).checkpoints()] == [8, 16, 20]
    for step in (16, 20):
        name = f"checkpoints/step-{step:08d}"
        assert not _of_directories(run / name, made / name)
    for step in range(9, 21):
        assert journal.difference(records(run)[step], records(made)[step]) is None
    assert problems(str(made)) == []


def test_the_checkpoint_is_linked_and_the_lineage_is_in_plan_and_manifest(run) -> None:
    made = branch(f"{run}@8", None, Choices(("optimizer.learning_rate=0.001",)), is_to_train=False)
    one, two = (Store(each).find(8) for each in (run, made))
    for name in one.manifest.files:
        assert os.path.samefile(one.path / name, two.path / name)
    assert two.manifest.parent == {"ref": "run@8", "digest": one.manifest.digest}
    parent = RunDirectory(made).plan()[0].parent
    assert (parent.ref, parent.step, parent.digest) == ("run@8", 8, one.manifest.digest)
    assert parent.changes == ("optimizer.learning_rate: 0.01 -> 0.001",)
    assert Store(run).pinned() == {8}
    (event,) = [record for record in journal.read(made) if record.get("event") == "branched"]
    assert event["step"] == 8 and event["ref"] == "run@8"


def test_a_run_that_may_not_be_written_is_branched_from_all_the_same(run, capsys) -> None:
    (run / "pins").write_text("in the way")  # root may write everywhere else
    made = branch(f"{run}@8", None, Choices(), is_quiet=True, until=9)
    told = [line for line in capsys.readouterr().err.splitlines() if "pinned" in line]
    assert len(told) == 1 and told[0].startswith(f"{run.name}@8 could not be pinned, so its run may prune it: ")
    assert [item.step for item in Store(made).checkpoints()] == [8, 9]


@pytest.mark.slow
def test_a_step_that_was_not_stored_is_made_real_first(run) -> None:
    made = branch(f"{run}@11", None, Choices())
    assert [item.step for item in Store(run).checkpoints()] == [8, 11, 16, 20]
    assert not _of_directories(run / "checkpoints/step-00000020", made / "checkpoints/step-00000020")


def test_a_branch_from_the_base_begins_anew(run) -> None:
    made = branch(f"{run}@0", None, Choices(("train.seed=1",)), until=3)
    assert list(records(made)) == [1, 2, 3]
    assert RunDirectory(made).plan()[0].parent.digest is None
    assert records(made)[1]["loss"] != records(run)[1]["loss"]


def test_changed_keys_count_from_the_next_step_on(run, tmp_path) -> None:
    made = branch(f"{run}@last", tmp_path / "longer", Choices(("train.steps=30", "optimizer.learning_rate=0.02")))
    assert max(records(made)) == 30
    assert Store(made).checkpoints()[-1].step == 30
    plan = RunDirectory(made).plan()[0]
    assert records(made)[21]["learning_rate"] == plan.learning_rate(21) > records(run)[20]["learning_rate"]


@pytest.mark.slow
def test_the_schedule_goes_on_or_begins_again(run, tmp_path) -> None:
    ways = {way: branch(f"{run}@8", tmp_path / way, Choices(schedule=way)) for way in ("continue", "restart")}
    rates = {way: [records(made)[step]["learning_rate"] for step in range(9, 21)] for way, made in ways.items()}
    assert rates["continue"] == [records(run)[step]["learning_rate"] for step in range(9, 21)]
    assert rates["restart"][0] == pytest.approx(0.01)  # its warm-up is one step
    assert rates["restart"] == sorted(rates["restart"], reverse=True) and rates["restart"][-1] < 0.001


def test_moments_stay_unless_they_are_reset(run, tmp_path) -> None:
    made = branch(f"{run}@8", tmp_path / "reset", Choices(is_optimizer_reset=True))
    state = json.loads((made / "checkpoints/step-00000020/state.json").read_bytes())
    assert set(state["scalars"].values()) == {12}
    assert records(made)[9]["loss"] == records(run)[9]["loss"] and records(made)[10]["loss"] != records(run)[10]["loss"]
    assert problems(str(made)) == []


def test_another_optimizer_needs_a_reset(run, tmp_path) -> None:
    with pytest.raises(RunError, match="moments of adamw"):
        branch(f"{run}@8", tmp_path / "sgd", Choices(("optimizer.name=sgd",)))
    made = branch(f"{run}@8", tmp_path / "sgd", Choices(("optimizer.name=sgd",), is_optimizer_reset=True))
    assert max(records(made)) == 20


@pytest.mark.slow
def test_rows_are_left_out_of_their_steps_alone(run, tmp_path) -> None:
    from finetune.store.run.row_losses import read_rows

    row = read_rows(run, 10)[2].row
    made = branch(f"{run}@8", tmp_path / "without", Choices(skipped_rows=str(row)))
    for step in range(9, 21):
        before, after = ([item.row for item in read_rows(each, step)] for each in (run, made))
        assert after == [each for each in before if each != row]
    assert records(made)[9] != records(made)[10]
    assert records(made)[10]["tokens"] < records(run)[10]["tokens"]
    assert replay(made, 9, 20)["identical"]


@pytest.mark.slow
def test_a_step_whose_rows_are_all_left_out_is_not_made(recipe_file, train, tmp_path) -> None:
    from finetune.store.run.row_losses import read_rows

    recipe = recipe_file(train=TRAIN | {"batch_size": 1}, checkpoint={"every": "8 steps"})
    run = train(recipe, tmp_path / "run")
    row = read_rows(run, 10)[0].row
    made = branch(f"{run}@8", tmp_path / "without", Choices(skipped_rows=str(row)))
    assert [step for step, record in records(made).items() if "skipped" in record] == [10]
    assert records(made)[10]["skipped"] == "skipped_rows"
    assert replay(made, 9, 20)["identical"]


@pytest.mark.slow
def test_a_branch_is_resumed_extended_and_branched_again(run, tmp_path, train) -> None:
    whole = branch(f"{run}@8", tmp_path / "whole", Choices(("train.seed=3",)))
    parts = branch(f"{run}@8", tmp_path / "parts", Choices(("train.seed=3",)), until=13)
    branch(f"{run}@8", tmp_path / "parts", Choices(("train.seed=3",)))  # the same command goes on
    assert not _of_directories(whole / "checkpoints/step-00000020", parts / "checkpoints/step-00000020")
    train(whole / "recipe.yaml", whole, "train.steps=24")
    assert max(records(whole)) == 24
    again = branch(f"{whole}@12", tmp_path / "again", Choices(), until=14)
    assert RunDirectory(again).plan()[0].parent.ref == "whole@12"
    with pytest.raises(RunError, match="begins with step 9"):
        replay(whole, 3, 10)


@pytest.mark.slow
def test_the_poisoned_row_that_bisect_finds_is_left_out_by_its_bundle(
    recipe_file, train, tmp_path, monkeypatch, tiny_tokenizer
) -> None:
    poison(monkeypatch, tiny_tokenizer, 30.0)
    rows = rows_with_marks(tmp_path / "rows.jsonl", 240, 6, [13])
    recipe = recipe_file(
        task={"name": "text", "max_length": 64}, data={"train": [{"path": str(tmp_path / "rows.jsonl")}]}, train=TRAIN
    )
    run = train(recipe, tmp_path / "run")
    facts = bisect(run, "loss > 20")
    assert (facts["first_bad_step"], facts["rows"][0]["id"]) == (13, rows[13])
    mended = branch(f"{run}@12", tmp_path / "mended", Choices(skipped_rows=str(facts["rows"][0]["id"])))
    assert max(record["loss"] for record in records(mended).values()) < 10
    ids = row_ids(f"{facts['bundle']}/rows.jsonl")
    assert rows[13] in ids and len(ids) == 6


@pytest.mark.parametrize(
    "settings", ["adapter.rank=8", "train.precision=bf16 train.weights=bf16", "base.checkpoint=elsewhere"]
)
def test_what_the_tensors_do_not_fit_is_refused(run, tmp_path, settings) -> None:
    with pytest.raises(RunError, match="tensors that do not fit"):
        branch(f"{run}@8", tmp_path / "other", Choices(tuple(settings.split())))
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_refused_in_words(run, tmp_path) -> None:
    with pytest.raises(RunError, match="none is left"):
        branch(f"{run}@20", tmp_path / "other", Choices())
    with pytest.raises(RunError, match=r"no training row is called \[999\]"):
        branch(f"{run}@8", tmp_path / "other", Choices(skipped_rows="999"))
    with pytest.raises(RunError, match="has no row ids"):
        branch(f"{run}@8", tmp_path / "other", Choices(skipped_rows="the bad ones"))
    with pytest.raises(CheckpointError, match="not a step of a run"):
        branch(str(run / "checkpoints/step-00000008"), tmp_path / "other", Choices())
    with pytest.raises(RecipeError, match="optimizer.rate"):
        branch(f"{run}@8", tmp_path / "other", Choices(("optimizer.rate=1",)))
    branch(f"{run}@8", tmp_path / "taken", Choices(), until=9)
    with pytest.raises(RunError, match="is another run"):
        branch(f"{run}@16", tmp_path / "taken", Choices())


def test_a_branch_that_was_cut_off_while_it_was_made_is_made_anew(run, tmp_path, monkeypatch) -> None:

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(branch_directory, "_past_of", cut)
    with pytest.raises(KeyboardInterrupt):
        branch(f"{run}@8", tmp_path / "made", Choices())
    monkeypatch.undo()
    branch(f"{run}@8", tmp_path / "made", Choices())
    assert max(records(tmp_path / "made")) == 20


@pytest.mark.slow
def test_two_processes_branch_from_a_step_that_was_not_stored(recipe_file, tmp_path) -> None:
    recipe = recipe_file(train=TRAIN, checkpoint={"every": "8 steps", "keep": {"last": 9}})
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        "finetune",
    ]

    def both(*arguments: object) -> str:
        result = forks.run(list(map(str, [*launcher, *arguments])), capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run, made = tmp_path / "run", tmp_path / "made"
    both("train", recipe, "--run", run, "--quiet")
    both("branch", f"{run}@11", "--run", made, "--quiet")
    assert [item.step for item in Store(run).checkpoints()] == [8, 11, 16, 20]
    assert not _of_directories(run / "checkpoints/step-00000020", made / "checkpoints/step-00000020")
    assert json.loads(both("replay", made, "--steps", "12..15", "--json"))["identical"]


@pytest.mark.slow
def test_a_branch_with_other_keys_is_bisected_from_where_it_begins(run, tmp_path) -> None:
    choices = Choices(("optimizer.learning_rate=0.001", "checkpoint.keep={last: 1}"))
    made = branch(f"{run}@8", tmp_path / "made", choices)
    assert [item.step for item in Store(made).checkpoints()] == [8, 20]  # the first one is pinned
    assert replay(made, 9, 20)["identical"]
    worst = max(range(10, 21), key=lambda step: records(made)[step]["loss"])
    facts = bisect(made, bad=worst)
    assert facts["cause"] in ("rows", "update") and facts["first_bad_step"] in (worst, worst - 1)
    facts = bisect(made, bad=9)
    assert (facts["first_bad_step"], facts["cause"]) == (9, "rows")


def test_a_step_that_was_never_made_is_no_place_to_branch_from(run, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="step 21 was never made"):
        branch(f"{run}@21", tmp_path / "other", Choices(("train.steps=40",)))


def test_a_run_that_lost_its_plan_is_not_taken_for_an_empty_place(run, tmp_path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "plan.json").unlink()
    with pytest.raises(RunError, match="has checkpoints of something else"):
        branch(f"{run}@8", other, Choices())
    assert [item.step for item in Store(other).checkpoints()] == [8, 16, 20]


@pytest.mark.slow
def test_rows_stay_left_out_in_a_branch_of_a_branch_with_another_seed(run, tmp_path) -> None:
    from finetune.store.run.row_losses import read_rows

    row = read_rows(run, 10)[2].row
    one = branch(f"{run}@8", tmp_path / "one", Choices(skipped_rows=str(row)), until=12)
    two = branch(f"{one}@12", tmp_path / "two", Choices(("train.seed=7",)))
    assert RunDirectory(two).plan()[0].skipped_rows == (row,)
    assert all(row not in [item.row for item in read_rows(two, step)] for step in range(13, 21))


def test_held_out_figures_of_other_rows_are_not_carried_over(run, tmp_path, chat_data) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join((chat_data / "holdout.jsonl").read_text().splitlines(keepends=True)[:3]))
    changed = f"data.holdout=[{{path: {few}}}]"
    made = branch(f"{run}@20", tmp_path / "made", Choices((changed, "train.steps=24")))
    evaluated = journal.evaluations(journal.read(made))
    assert list(evaluated) == [24] and evaluated[24]["rows"] == 3


def test_a_branch_with_other_rows_or_another_length_passes_the_gates(run, tmp_path) -> None:
    with pytest.raises(DataError, match=r"run@8: task.max_length cuts (.|\n)* start all the same with data.allow"):
        branch(f"{run}@8", tmp_path / "cut", Choices(("task.max_length=30",)), is_to_train=False)
    assert not (tmp_path / "cut").exists()


def test_a_long_list_of_rows_is_a_list() -> None:
    assert row_ids(",".join(map(str, range(1000, 1200)))) == list(range(1000, 1200))


@pytest.fixture(scope="module")
def rows_of_an_epoch(tmp_path_factory):
    path = tmp_path_factory.mktemp("epoch") / "rows.jsonl"
    path.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in range(28)))
    return path


@pytest.fixture
def epoch_run(recipe_file, train_once, tmp_path, rows_of_an_epoch):
    """28 rows in 7 steps of 4, stopped after step 3."""
    recipe = recipe_file(
        data={"train": [{"path": str(rows_of_an_epoch)}]},
        train={"epochs": 1, "batch_size": 4, "precision": "fp32", "micro_batch_tokens": 512},
        checkpoint={"every": "3 steps", "keep": {"last": 9}},
    )
    return train_once(recipe, tmp_path / "run")


def rows_of(run):
    from finetune.store.run.row_losses import read_rows

    rows = {step: [item.row for item in read_rows(run, step)] for step in records(run)}
    return {step: drawn for step, drawn in rows.items() if drawn}  # a branch has no rows of the steps before it


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "steps"), [(8, 5), (16, 4), (32, 4), (1, 19), (3, 9)])
def test_a_branch_with_another_batch_size_goes_on_at_the_next_unseen_example(
    epoch_run, tmp_path, capsys, batch_size, steps
) -> None:
    made = branch(f"{epoch_run}@3", tmp_path / "branch", Choices((f"train.batch_size={batch_size}",)))
    assert max(records(made)) == steps == RunDirectory(made).plan()[0].steps
    before, after = rows_of(epoch_run), rows_of(made)
    seen = [row for step in (1, 2, 3) for row in before[step]]
    left = [row for step in range(4, steps + 1) for row in after[step]]
    assert left == [row for step in range(4, 8) for row in before[step]]
    assert sorted(seen + left) == list(range(28))
    said = capsys.readouterr().err
    assert "goes on at example 13 of 28 in epoch 1\n" in said and f"steps: 7 -> {steps}\n" in said
    assert replay(made, 4, steps)["identical"]


@pytest.mark.slow
def test_a_branch_with_another_batch_size_keeps_the_course_of_the_learning_rate(epoch_run, tmp_path) -> None:
    made = branch(f"{epoch_run}@3", tmp_path / "branch", Choices(("train.batch_size=8",)))
    old, new = RunDirectory(epoch_run).plan()[0], RunDirectory(made).plan()[0]
    # two updates cover what four did: each has the rate of where it ends
    assert new.learning_rate(4) == pytest.approx(old.learning_rate(5))
    assert new.learning_rate(5) == pytest.approx(old.learning_rate(7))
    smaller = branch(f"{epoch_run}@3", tmp_path / "smaller", Choices(("train.batch_size=2",), schedule="restart"))
    assert records(smaller)[4]["learning_rate"] == pytest.approx(0.01)


@pytest.mark.slow
def test_a_branch_with_another_seed_draws_the_rest_of_the_epoch_in_another_order(epoch_run, tmp_path) -> None:
    made = branch(f"{epoch_run}@3", tmp_path / "branch", Choices(("train.seed=1",)))
    before, after = rows_of(epoch_run), rows_of(made)
    left = [[row for step in range(4, 8) for row in rows[step]] for rows in (before, after)]
    assert left[0] != left[1] and sorted(left[0]) == sorted(left[1])


@pytest.mark.slow
def test_a_branch_of_a_branch_goes_on_where_that_one_is(epoch_run, tmp_path) -> None:
    one = branch(f"{epoch_run}@3", tmp_path / "one", Choices(("train.batch_size=8", "train.epochs=2")), until=4)
    two = branch(f"{one}@4", tmp_path / "two", Choices(("train.batch_size=5",)))
    drawn = [*range(1, 5)], [*range(5, max(records(two)) + 1)]
    rows = [row for step in drawn[0] for row in (rows_of(epoch_run) | rows_of(one))[step]]
    rows += [row for step in drawn[1] for row in rows_of(two)[step]]
    assert sorted(rows[:28]) == sorted(rows[28:]) == list(range(28))
    same = branch(f"{two}@last", tmp_path / "longer", Choices(("train.epochs=3",)))
    assert RunDirectory(same).plan()[0].earlier_orders == RunDirectory(two).plan()[0].earlier_orders
