"""A run on many packed files, chosen rows and chosen files of a Hub data set: planned, resumed, moved, and refused when a file changed."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from finetune.errors import RunError
from finetune.recipe.load import load
from finetune.store import places
from finetune.training import encoding
from finetune.training.run import train
from tests.conftest import chat_row


def lines(first: int, count: int) -> bytes:
    rows = ({**chat_row(number), "lang": "en" if number % 2 else "de"} for number in range(first, first + count))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def recipe(directory: Path, tiny_base: Path, **source: object) -> Path:
    sections = {
        "base": {"checkpoint": str(tiny_base)},
        "task": {"name": "chat", "max_length": 64},
        "data": {"train": [source], "holdout": 4},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 2, "batch_size": 4, "precision": "fp32"},
    }
    (directory / "recipe.yaml").write_text(json.dumps(sections))
    return directory / "recipe.yaml"


@pytest.mark.slow
def test_a_run_on_many_packed_files_goes_on_until_a_file_is_added(tmp_path, tiny_base) -> None:
    corpus, run = tmp_path / "corpus", tmp_path / "runs/a"
    (corpus / "more").mkdir(parents=True)
    for name, first in (("a", 0), ("more/b", 20)):
        (corpus / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(first, 20)))
    file = recipe(tmp_path, tiny_base, path=f"{corpus}/**/*.jsonl.gz", where="lang == en", take=15, skip=["lang"])
    train(load(file), run, is_quiet=True)
    plan = json.loads((run / "plan.json").read_text())
    assert [source["rows"] for source in plan["train"]] == [15]
    train(load(file), run, is_quiet=True)
    corpus.rename(tmp_path / "moved")
    with places.named([], {str(corpus): str(tmp_path / "moved")}):
        train(load(file, ["train.steps=3"]), run, is_quiet=True)
    shutil.copytree(tmp_path / "moved", corpus)
    (corpus / "c.jsonl").write_bytes(lines(40, 2))
    train(load(file, ["train.steps=3"]), run, is_quiet=True)
    (corpus / "c.jsonl.gz").write_bytes(gzip.compress(lines(40, 2)))
    shutil.rmtree(tmp_path / "moved")
    places._known.found.clear()
    with pytest.raises(RunError) as caught:
        train(load(file, ["train.steps=3"]), run, is_quiet=True)
    assert caught.value.message.startswith("what the run trains on has changed since it was planned:")
    assert "\n  train[0].fingerprint: blake3:" in caught.value.message


@pytest.mark.slow
def test_chosen_files_of_a_data_set_are_pinned_read_and_read_again_without_the_hub(
    hub, online, base, recipe_file, finetune
) -> None:
    repo = hub.add("dataset", "tiny/many")
    repo.commit({"en/a.jsonl.gz": gzip.compress(lines(0, 10)), "en/b.jsonl": lines(10, 10), "de/c.jsonl": lines(20, 5)})
    data = {"train": [{"dataset": "tiny/many", "files": ["en/*"], "split": "train[:15]", "skip": ["lang"]}]}
    file = recipe_file(base={"checkpoint": "tiny/base"}, data=data)
    first = finetune("plan", file, "--json", env=online)
    assert first.returncode == 0, first.stderr
    plan = json.loads(first.stdout)["train"][0]
    assert (plan["rows"], plan["revision"]) == (15, repo.branches["main"])
    assert plan["read"] == "2 files, JSON Lines in `.gz` and JSON Lines, `train[:15]`"
    assert not hub.seen("GET", "de/c.jsonl"), "what nobody chose is not fetched"
    offline = finetune("plan", file, "--json", env=online | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0 and json.loads(offline.stdout)["train"][0] == plan, offline.stderr
    data = {"train": [{"dataset": "tiny/many", "files": ["fr/*"]}]}
    absent = finetune("plan", recipe_file(base={"checkpoint": "tiny/base"}, data=data), env=online)
    assert absent.returncode == 1
    assert f"tiny/many@{repo.branches['main'][:8]}: no file matches `fr/*`\nhint: correct `files`" in absent.stderr


def test_worker_processes_read_many_files_to_the_same_bytes(tmp_path, tiny_base, monkeypatch) -> None:
    from finetune.data import encode

    (tmp_path / "corpus").mkdir()
    for name, first in (("a", 0), ("b", 20)):
        (tmp_path / f"corpus/{name}.jsonl.gz").write_bytes(gzip.compress(lines(first, 20)))
    file = recipe(tmp_path, tiny_base, path=str(tmp_path / "corpus"), where="lang == en", skip=["lang"])
    found = []

    def encoded(rows, where, encoder, *key, content, reopen, skips_bad):
        work = reopen()
        found.append([rows[index] for index in range(len(rows))] == [work.rows[index] for index in range(len(rows))])
        return encode.encode(rows, where, encoder, *key, content=content, reopen=reopen, skips_bad=skips_bad)

    monkeypatch.setattr(encoding, "encode", encoded)
    train(load(file), tmp_path / "runs/a", is_quiet=True)
    assert found == [True]
