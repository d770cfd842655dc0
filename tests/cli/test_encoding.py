"""`finetune encode` makes ahead what a training would make first, alone or as one of several tasks."""

import json

from click.testing import CliRunner

from finetune.cli import cli
from finetune.data import encode as encoding
from finetune.recipe.load import load
from finetune.training.resolve import resolve


def test_tasks_encode_a_recipe_and_the_training_finds_it_done(recipe_file, chat_data, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "SHARD_ROWS", 8)
    data = {
        part: [{"path": str(chat_data / f"{name}.jsonl")}]
        for part, name in (("train", "train"), ("holdout", "holdout"))
    }
    recipe = recipe_file(data=data)
    said = [CliRunner().invoke(cli, ["encode", str(recipe), "--shard", f"{number}/2", "--json"]) for number in (2, 1)]
    first, second = [json.loads(each.stdout) for each in said]
    assert not first["ok"] and [one["examples"] for one in first["sources"]] == [None, 8]
    assert second["ok"] and [one["examples"] for one in second["sources"]] == [40, 8]
    made = sorted((tmp_path / "cache/encoded").iterdir())
    resolved = resolve(load(recipe))
    assert resolved.plan.counts.examples == 40 and sorted((tmp_path / "cache/encoded").iterdir()) == made
    listed = CliRunner().invoke(cli, ["encode", str(recipe)])
    assert f"train.jsonl  40 rows  40 examples, {resolved.plan.counts.tokens:,} tokens" in listed.stdout


def test_a_shard_that_is_none_is_a_usage_error(recipe_file):
    for text in ("0/2", "3/2", "1", "a/b"):
        said = CliRunner().invoke(cli, ["encode", str(recipe_file()), "--shard", text])
        assert said.exit_code == 2 and f"`{text}` is not like 3/16, the third of 16 tasks" in said.stderr
