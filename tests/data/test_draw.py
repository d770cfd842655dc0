"""What a recipe holds out of its rows: by what they say, each once, and on one side only."""

import csv
import json

import pytest

from finetune.errors import DataError
from finetune.recipe.load import load
from finetune.training.resolve import resolve
from tests.conftest import chat_row


@pytest.fixture
def sides(recipe_file, tmp_path):
    """What is held out of rows and what is trained on, each with the number of rows; and the plan."""

    def sides(holdout: int | str, *names: str, **data: object):
        sources = [{"path": str(tmp_path / name)} for name in names]
        resolved = resolve(load(recipe_file(data={"train": sources, "holdout": holdout, **data})))
        part = [
            sorted(bytes(part[number].tokens) for number in range(len(part)))
            for part in (resolved.holdout, resolved.train)
        ]
        return *part, resolved.plan

    return sides


@pytest.fixture
def write(tmp_path):
    def write(name: str, rows: list[dict]) -> None:
        if name.endswith(".csv"):
            with open(tmp_path / name, "w", newline="") as file:
                made = csv.DictWriter(file, rows[0].keys())
                made.writeheader()
                made.writerows(rows)
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


ROWS = [chat_row(number) for number in range(60)]
PAIRS = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in ROWS]


def test_name_order_format_and_unused_columns_of_a_file_do_not_count(sides, write):
    write("a.jsonl", ROWS)
    write("b.jsonl", ROWS[::-1])
    write("c.csv", PAIRS)
    write("d.jsonl", [{**row, "id": number, "note": None} for number, row in enumerate(ROWS)])
    write("e.jsonl", [{"asked": pair["prompt"], "said": pair["completion"]} for pair in PAIRS])
    write("f.jsonl", ROWS[:20])
    write("g.jsonl", ROWS[20:])
    held_out, trained, plan = sides(12, "a.jsonl")
    assert len(held_out) == 12 and plan.holdout_counts.rows == 12
    for name in ("b.jsonl", "c.csv", "d.jsonl"):
        other = sides(12, name)
        assert (other[0], other[2].split, other[2].held_out) == (held_out, plan.split, plan.held_out), name
    assert sides(12, "f.jsonl", "g.jsonl")[0] == held_out
    assert sides(12, "a.jsonl", split_seed=1)[0] != held_out


def test_rows_of_renamed_columns_are_the_same_rows(sides, write, recipe_file, tmp_path):
    write("a.jsonl", PAIRS)
    write("b.jsonl", [{"asked": pair["prompt"], "said": pair["completion"]} for pair in PAIRS])
    columns = {"path": str(tmp_path / "b.jsonl"), "columns": {"prompt": "asked", "completion": "said"}}
    plan = resolve(load(recipe_file(data={"train": [columns], "holdout": 12}))).plan
    assert plan.held_out == sides(12, "a.jsonl")[2].held_out


def test_equal_rows_are_on_one_side_and_evaluated_once(sides, write):
    write("a.jsonl", ROWS * 3)
    held_out, trained, plan = sides(12, "a.jsonl")
    assert len(held_out) == len(set(held_out)) == 12
    assert not set(held_out) & set(trained) and len(trained) == 3 * 48
    write("b.jsonl", ROWS[:9] + [ROWS[9]] * 200)
    for seed in range(4):  # whichever side the many are on
        held_out, trained, plan = sides(5, "b.jsonl", split_seed=seed)
        assert len(held_out) == 5 and not set(held_out) & set(trained)


def test_equal_rows_of_weighted_sources_are_on_one_side(recipe_file, write, tmp_path):
    write("a.jsonl", ROWS)
    write("b.jsonl", ROWS[30:] + [chat_row(number) for number in range(60, 80)])
    sources = [{"path": str(tmp_path / name), "weight": weight} for name, weight in (("a.jsonl", 1), ("b.jsonl", 3))]
    resolved = resolve(load(recipe_file(data={"train": sources, "holdout": 20})))
    held_out = {bytes(resolved.holdout[number].tokens) for number in range(len(resolved.holdout))}
    trained = {bytes(resolved.train[number].tokens) for number in range(len(resolved.train))}
    assert len(held_out) == 20 and not held_out & trained


@pytest.mark.parametrize("holdout", ["20%", 12])
def test_rows_that_are_added_leave_the_others_where_they_are(sides, write, holdout):
    write("a.jsonl", ROWS)
    write("b.jsonl", [chat_row(number) for number in range(60, 90)] + ROWS)
    before, after = sides(holdout, "a.jsonl"), sides(holdout, "b.jsonl")
    assert not set(before[1]) & set(after[0])  # what was trained on is never held out
    if holdout == "20%":
        assert set(before[0]) <= set(after[0])


def test_a_share_of_few_rows_that_takes_none_is_refused(sides, write):
    write("a.jsonl", ROWS[:3])
    with pytest.raises(DataError, match="data.holdout takes none of 3 rows") as caught:
        sides("0.1%", "a.jsonl")
    assert caught.value.hint == "hold out a larger share, or a count"


def test_a_count_that_takes_all_different_rows_is_refused(sides, write):
    write("a.jsonl", ROWS[:5] * 8)
    with pytest.raises(DataError, match="data.holdout takes 40 of 40 rows, so none is left to train on"):
        sides(5, "a.jsonl")


def test_rows_of_a_held_out_file_that_are_trained_on_as_well_are_counted(recipe_file, write, tmp_path):
    write("a.jsonl", ROWS[:40])
    write("b.csv", PAIRS[35:45])
    data = {name: [{"path": str(tmp_path / file)}] for name, file in (("train", "a.jsonl"), ("holdout", "b.csv"))}
    plan = resolve(load(recipe_file(data=data))).plan
    assert plan.seen_told == ["5 of 10 held-out rows are training rows of this run"]


def test_long_text_rows_are_held_out_with_all_their_examples(recipe_file, write, tmp_path):
    write("a.jsonl", [{"text": f"{number} " * 200} for number in range(20)])
    path = recipe_file(
        task={"name": "text", "max_length": 32}, data={"train": [{"path": str(tmp_path / "a.jsonl")}], "holdout": 4}
    )
    resolved = resolve(load(path))
    assert len(set(resolved.holdout.rows.tolist())) == 4 < len(resolved.holdout)
    assert not set(resolved.holdout.rows.tolist()) & set(resolved.train.rows.tolist())


def test_equal_rows_on_both_sides_of_an_older_run_are_counted_in_its_branches(recipe_file, write, tmp_path):
    write("a.jsonl", ROWS[:20] * 2)
    loaded = load(recipe_file(data={"train": [{"path": str(tmp_path / "a.jsonl")}], "holdout": 12}))
    older = resolve(loaded).plan.model_copy(update={"split": None, "held_out": "", "stages": None})
    plan = resolve(loaded, like=older, stages=()).plan
    assert plan.split is None and plan.holdout_counts.rows == 12
    assert [item.by for item in plan.seen] == ["this run"] and plan.seen[0].rows > 0
