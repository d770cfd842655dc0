"""Held-out rows stay held out: in branches, in second stages, with other seeds and with more rows; and a figure on rows that were trained on
is refused or says so.
"""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.compare.evaluate import evaluate
from finetune.debug.branch import Choices, branch
from finetune.debug.diff import diff, listing
from finetune.errors import DataError, FinetuneError, RunError
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.inspect import log, tree
from finetune.training.resolve import resolve
from tests.conftest import chat_row

TRAIN = {"steps": 6, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
FIXTURE = Path(__file__).parents[1] / "fixtures/older_run"


def write(path: Path, numbers) -> str:
    path.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    return str(path)


@pytest.fixture
def rows(tmp_path) -> str:
    return write(tmp_path / "rows.jsonl", range(60))


@pytest.fixture
def recipe(recipe_file, rows):
    def recipe(name: str = "tiny", holdout: object = 12, path: str = rows, **sections: object) -> Path:
        data = {"train": [{"path": path}], "holdout": holdout} | sections.pop("data", {})
        return recipe_file(name, data=data, **{"train": TRAIN, "adapter": None} | sections)

    return recipe


@pytest.fixture
def run(recipe, train, tmp_path) -> Path:
    return train(recipe(), tmp_path / "one")


def sides(path: Path, *arguments) -> tuple[set, set]:
    """What a recipe or a run holds out, and what it trains on."""
    if path.is_dir():
        plan, _ = RunDirectory(path).plan()
        resolved = resolve(load(path / "recipe.yaml"), plan)
    else:
        resolved = resolve(load(path, arguments))
    return tuple({bytes(part[n].tokens) for n in range(len(part))} for part in (resolved.holdout, resolved.train))


def loss(run: Path, step: int) -> float:
    return journal.evaluations(journal.read(run))[step]["loss"]


@pytest.mark.slow
def test_a_branch_with_another_seed_is_evaluated_on_the_rows_of_its_parent(run, tmp_path) -> None:
    made = branch(f"{run}@4", tmp_path / "seed", Choices(("train.seed=1",)), is_quiet=True)
    assert sides(made)[0] == sides(run)[0]
    assert RunDirectory(made).plan()[0].held_out == RunDirectory(run).plan()[0].held_out
    [result] = evaluate([f"{made}@6"], None, (), is_again=True)
    assert (result["metrics"]["loss"], result["seen_rows"]) == (loss(made, 6), 0)
    assert RunDirectory(made).plan()[0].seen == ()
    assert [item["is_comparable"] for item in log(run)["branches"]] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "renamed.jsonl"])
def test_a_branch_with_more_rows_holds_out_nothing_that_its_parent_trained_on(run, rows, tmp_path, name) -> None:
    held_out, trained = sides(run)
    more = write(tmp_path / name, range(89, -1, -1))
    changes = () if name == "rows.jsonl" else (f"data.train=[{{path: {more}}}]",)
    made = branch(f"{run}@4", tmp_path / "more", Choices(changes), is_quiet=True)
    assert held_out < sides(made)[0] and not trained & sides(made)[0]
    [facts] = log(run)["branches"]
    assert facts["is_comparable"] is False
    assert "other held-out rows" in tree(log(run))


@pytest.mark.slow
def test_a_branch_that_asks_for_other_held_out_rows_is_refused_where_they_were_trained_on(run, tmp_path) -> None:
    for change in ("data.split_seed=1", "data.holdout=20", "data.holdout=40%"):
        with pytest.raises(RunError, match=r"\d+ of \d+ held-out rows are training rows of one@4") as caught:
            branch(f"{run}@4", tmp_path / "other", Choices((change,)), is_quiet=True)
        assert "data.seen: allow" in caught.value.hint
    assert (
        sides(branch(f"{run}@4", tmp_path / "fewer", Choices(("data.holdout=6",)), is_to_train=False))[0]
        < sides(run)[0]
    )
    made = branch(f"{run}@4", tmp_path / "other", Choices(("data.holdout=20", "data.seen=allow")), is_quiet=True)
    assert [(item.by, item.rows) for item in RunDirectory(made).plan()[0].seen] == [("one@4", 8)]
    assert "! 8 of 20 held-out rows are training rows of one@4" in tree(log(run))
    facts = diff(f"{run}@6", f"{made}@6")
    assert facts["are_same_rows"] is False and "are of different rows" in listing(facts)
    with pytest.raises(DataError, match="8 of 20 held-out rows are training rows of one@4"):
        evaluate([f"{made}@6"], None, ())
    own, other = evaluate([f"{run}@6", f"{made}@6"], None, (), is_seen_allowed=True)
    assert other["seen_rows"] == 8 and (own["is_comparable"], other["is_comparable"]) == (True, False)
    answer = CliRunner().invoke(cli, ["evaluate", f"{run}@6", f"{made}@6", "--seen"])
    assert [line.endswith("  other held-out rows") for line in answer.stdout.splitlines()] == [False, True]


@pytest.mark.slow
def test_a_second_stage_holds_out_what_the_first_one_did(run, recipe, train, tmp_path) -> None:
    two = train(recipe("two", base={"checkpoint": f"{run}@6"}, train=TRAIN | {"seed": 7}), tmp_path / "two")
    assert sides(two)[0] == sides(run)[0]
    three = recipe("three", base={"checkpoint": f"{two}@last"}, path=write(tmp_path / "more.jsonl", range(90)))
    held_out, _ = sides(three)
    assert sides(run)[0] < held_out and not held_out & sides(run)[1]
    assert [stage.ref for stage in resolve(load(three)).plan.stages] == ["two@6", "one@6"]
    with pytest.raises(RunError, match="held-out rows are training rows of one@6"):
        resolve(load(recipe("other", base={"checkpoint": f"{run}@6"}, data={"split_seed": 3})))
    (run / "plan.json").unlink()  # what matters of it is in the plan of the second
    assert evaluate([f"{two}@6"], None, ())[0]["seen_rows"] == 0


def test_a_second_stage_on_other_rows_holds_out_as_many_as_it_asks_for(run, recipe, tmp_path) -> None:
    other = write(tmp_path / "other.jsonl", range(60, 140))
    plan = resolve(load(recipe("two", base={"checkpoint": f"{run}@6"}, path=other, holdout=12))).plan
    assert plan.holdout_counts.rows == 12 and plan.seen == ()


def test_a_first_stage_that_held_out_nothing_trained_on_everything(recipe, train, tmp_path) -> None:
    run = train(recipe("all", holdout=0), tmp_path / "all")
    with pytest.raises(RunError, match="12 of 12 held-out rows are training rows of all@6"):
        resolve(load(recipe("two", base={"checkpoint": f"{run}@6"})))


@pytest.mark.slow
def test_three_seeds_are_compared_on_rows_that_none_of_them_had(recipe, train, tmp_path) -> None:
    runs = [train(recipe(f"seed-{seed}", train=TRAIN | {"seed": seed}), tmp_path / f"seed-{seed}") for seed in range(3)]
    results = evaluate([f"{run}@6" for run in runs], recipe("seed-2", train=TRAIN | {"seed": 2}), (), is_again=True)
    assert [(result["seen_rows"], result["is_comparable"]) for result in results] == [(0, True)] * 3
    assert [result["metrics"]["loss"] for result in results] == [loss(run, 6) for run in runs]
    with pytest.raises(DataError, match="held-out rows are training rows of seed-0@6"):
        evaluate([f"{runs[0]}@6"], recipe("other", data={"split_seed": 1}), ())
    assert (
        evaluate([f"{runs[0]}@0"], recipe("other", data={"split_seed": 1}), ())[0]["seen_rows"] == 0
    )  # it is the base


@pytest.mark.slow
def test_rows_of_a_named_file_that_a_run_trained_on_are_found_in_any_format(run, recipe, tmp_path, capsys) -> None:
    pairs = [[message["content"] for message in chat_row(number)["messages"]] for number in range(50, 70)]
    file = tmp_path / "held.csv"
    file.write_text("note,completion,prompt\n" + "".join(f"{n},{b},{a}\n" for n, (a, b) in enumerate(pairs)))
    named = recipe("named", holdout=[{"path": str(file)}])
    with pytest.raises(DataError, match=r"\d of 20 held-out rows are training rows of one@6") as caught:
        evaluate([f"{run}@6"], named, ())
    assert "--seen" in caught.value.hint
    [result] = evaluate([f"{run}@6"], named, (), is_seen_allowed=True)
    trained = len(
        sides(run)[1]
        & {bytes(t) for t in sides(recipe("c", path=write(tmp_path / "c.jsonl", range(50, 60)), holdout=0))[1]}
    )
    assert result["seen_rows"] == trained > 0


@pytest.mark.slow
def test_what_cannot_be_checked_is_refused_as_well(run, recipe, rows, tmp_path, monkeypatch) -> None:
    other = recipe("other", data={"split_seed": 1}, path=write(tmp_path / "same.jsonl", range(59, -1, -1)))
    Path(rows).unlink()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))  # the other one may know what the rows said
    with pytest.raises(
        DataError, match="whether one@6 trained on held-out rows cannot be checked: .*rows.jsonl: is not here any more"
    ):
        evaluate([f"{run}@6"], other, ())
    assert evaluate([f"{run}@6"], other, (), is_seen_allowed=True)[0]["seen_rows"] is None


@pytest.mark.slow
def test_a_branch_of_an_older_run_keeps_its_held_out_rows(tmp_path, monkeypatch) -> None:
    shutil.copytree(FIXTURE, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    run = Path("runs/older")
    held_out, trained = sides(run)
    made = branch(f"{run}@8", Path("runs/seed"), Choices(("train.seed=9",)), is_quiet=True)
    assert sides(made)[0] == held_out
    file = write(Path("data/more.jsonl"), range(99, -1, -1))
    made = branch(f"{run}@8", Path("runs/more"), Choices((f"data.train=[{{path: {file}}}]",)), is_quiet=True)
    assert sides(made)[0] == held_out
    assert evaluate([f"{made}@12"], None, ())[0]["seen_rows"] == 0
    with pytest.raises(DataError, match="of 12 held-out rows are training rows of older@4"):
        evaluate(["runs/older-seed@8"], None, ())  # an older version's own branch
    write(Path("data/train.jsonl"), range(100))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FinetuneError, match="older version drew, and they cannot be found again"):
        branch(f"{run}@8", Path("runs/gone"), Choices(("train.seed=3",)), is_quiet=True)
