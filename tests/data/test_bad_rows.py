"""Rows that cannot be read are skipped where the recipe says so: counted, listed, and on neither side."""

import json

import numpy as np
import pytest

from finetune.data import bad_rows
from finetune.data import encode as encode_module
from finetune.data.encode import encode
from finetune.data.example import Example
from finetune.errors import DataError
from finetune.plan.split import BAD
from finetune.recipe.load import load
from finetune.training.resolve import resolve
from tests.cli.test_main import run_main
from tests.conftest import chat_row


class Rows(list):
    def __getitem__(self, number):
        if (row := super().__getitem__(number)) == "unreadable":
            raise DataError("bad JSON", where=f"rows:{number}")
        return row


def encoder(rows, places):
    for row, place in zip(rows, places, strict=True):
        if row == "refused":
            raise DataError("is refused", where=place)
    return [[Example(np.full(3, len(row)), np.ones(3, dtype=bool))] for row in rows]


MIXED = Rows(["a", "unreadable", "aa", "refused", "aaa", "aaaa", "refused", "aaaaa", "a"])


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))

    def encoded(rows, key, shard=4096, encoder=encoder, **options):
        monkeypatch.setattr(encode_module, "SHARD_ROWS", shard)
        return encode(rows, "rows:{}".format, encoder, key, **options)

    return encoded


@pytest.mark.parametrize("shard", [2, 4096])
def test_good_rows_are_encoded_and_bad_ones_listed(encoded, tmp_path, shard) -> None:
    found = encoded(MIXED, "mixed", shard, skips_bad=True)
    assert found.rows.tolist() == [0, 2, 4, 5, 7, 8] and found.bad_rows == 3
    assert [found[number].tokens[0] for number in range(6)] == [1, 2, 3, 4, 5, 1]
    assert np.flatnonzero(found.contents == BAD).tolist() == [1, 3, 6]
    assert found.first_bad_rows == [
        {"row": 1, "where": "rows:1", "message": "bad JSON"},
        {"row": 3, "where": "rows:3", "message": "is refused"},
        {"row": 6, "where": "rows:6", "message": "is refused"},
    ]
    [entry] = (tmp_path / "cache/encoded").iterdir()
    assert list(bad_rows.read(entry)) == found.first_bad_rows


def test_a_source_encoded_with_skipping_is_not_taken_for_one_without(encoded) -> None:
    encoded(MIXED, "mixed", skips_bad=True)
    with pytest.raises(DataError, match="3 of 9 rows are refused"):
        encoded(MIXED, "mixed")


def test_after_a_kill_the_bad_rows_of_finished_shards_are_still_listed(encoded) -> None:
    def killed(rows, places):
        if "aaaaa" in rows:
            raise KeyboardInterrupt
        return encoder(rows, places)

    with pytest.raises(KeyboardInterrupt):
        encoded(MIXED, "killed", 2, killed, skips_bad=True)
    again, whole = encoded(MIXED, "killed", 2, skips_bad=True), encoded(MIXED, "whole", 2, skips_bad=True)
    assert again.first_bad_rows == whole.first_bad_rows and again.contents.tolist() == whole.contents.tolist()


@pytest.mark.parametrize("shard", [2, 4096])
def test_more_than_half_is_refused_with_the_first_reason(encoded, shard) -> None:
    with pytest.raises(DataError) as caught:
        encoded(Rows(["refused", "unreadable", "a", "refused", "a"]), "most", shard, skips_bad=True)
    assert str(caught.value) == (
        "rows:0: 3 of 5 rows are bad, more than half; the first one is refused\n"
        "hint: most rows do not fit: look at the file, or name its shape with data.train[].format"
    )
    half = encoded(Rows(["refused", "a", "unreadable", "aa"]), "half", shard, skips_bad=True)
    assert half.bad_rows == 2


@pytest.fixture
def files(tmp_path):
    """The good rows of a file, and the same with bad ones between them."""
    rows = [json.dumps({"conversations": [turn(each) for each in chat_row(n)["messages"]]}) for n in range(40)]
    bad = ['{"torn', '{"conversations": []}', '{"instruction": "a", "output": "b"}', '{"conversations": 5}']
    (tmp_path / "good.jsonl").write_text("\n".join(rows))
    (tmp_path / "mixed.jsonl").write_text("\n".join([bad[0], *rows[:10], *bad[1:], *rows[10:], bad[0]]))
    return tmp_path / "good.jsonl", tmp_path / "mixed.jsonl"


def turn(message: dict) -> dict:
    return {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}


@pytest.mark.parametrize("holdout", [7, "20%", None])
def test_bad_rows_are_on_neither_side_and_move_no_other_row(recipe_file, files, holdout) -> None:
    plans = []
    for file in files:
        own = [{"path": str(file)}] if holdout is None else holdout
        data = {"train": [{"path": str(file)}], "holdout": own, "on_bad_row": "skip", "seen": "allow"}
        resolved = resolve(load(recipe_file(data=data)))
        sides = [[bytes(part[n].tokens) for n in range(len(part))] for part in (resolved.train, resolved.holdout)]
        plans.append((resolved.plan, sides, resolved.held_out.digest))
    [(good, sides, digest), (mixed, other_sides, other_digest)] = plans
    assert sides == other_sides and digest == other_digest and good.split == mixed.split
    assert mixed.counts == good.counts.model_copy(update={"bad_rows": 5})
    assert mixed.holdout_counts == good.holdout_counts and good.plan_id != mixed.plan_id


@pytest.mark.slow
def test_plan_says_how_rows_were_read_and_lists_bad_ones(recipe_file, files, monkeypatch, capsys) -> None:
    _, file = files
    recipe = recipe_file(data={"train": [{"path": str(file)}], "on_bad_row": "skip"})
    code, said, _ = run_main(monkeypatch, capsys, "plan", recipe)
    assert (
        code == 0
        and f"format     sharegpt  {file}  first row " in said
        and '{"conversations": [{"from": "human"' in said
    )
    assert f"bad rows   5 rows of {file} skipped (data.on_bad_row)\n           {file}:1: bad JSON: " in said
    facts = json.loads(run_main(monkeypatch, capsys, "plan", recipe, "--json")[1])
    assert facts["formats"][0]["format"] == "sharegpt"
    assert facts["bad_rows"][0]["bad_rows"] == 5 and facts["rows"] == 40 and facts["holdout_copies"] == 0
    assert [row["where"] for row in facts["bad_rows"][0]["first"]][:2] == [f"{file}:1", f"{file}:12"]
    said = run_main(monkeypatch, capsys, "train", recipe, "--run", file.parent / "run", "--until", "1", "--quiet")[2]
    assert f"warning: 5 rows of {file} skipped as bad (data.on_bad_row); the first one is {file}:1: bad JSON" in said
    with pytest.raises(DataError, match=r"mixed\.jsonl:1: bad JSON"):
        resolve(load(recipe_file(data={"train": [{"path": str(file)}]})))
