"""Encoding in real processes: several of them make the same bytes, and what a killed one had finished is not made again."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from finetune.data import encode as encoding
from finetune.data.encode import encode
from finetune.recipe.load import load
from finetune.training import encoding as in_training
from finetune.training.resolve import resolve
from tests import forks

SCRIPT = Path(__file__).with_name("encoding_process.py")


@pytest.fixture
def start(tmp_path):
    """Starts an encoding of a cache of its own, named; the log has a line a call of the encoder."""

    def start(cache="cache", is_measured=False, **options):
        options = {"rows": 100, "shard": 8, "log": str(tmp_path / f"{cache}.log")} | options
        environment = os.environ | {"FINETUNE_CACHE": str(tmp_path / cache)}
        command = [sys.executable, str(SCRIPT), json.dumps(options)]
        # a fork has the memory of what it was forked from
        popen = subprocess.Popen if is_measured else forks.Popen
        return popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def encoded(start):
    def encoded(cache="cache", **options):
        process = start(cache, **options)
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
        return json.loads(out)

    return encoded


def calls(tmp_path, cache="cache"):
    return [tuple(map(int, line.split())) for line in (tmp_path / f"{cache}.log").read_text().splitlines()]


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def without_memory(result):
    return {name: value for name, value in result.items() if name != "most_bytes"}


@pytest.mark.slow
def test_worker_processes_make_the_same_bytes_as_one_process(encoded, tmp_path):
    alone, together = encoded("alone"), encoded("together", workers=2)
    assert together["servers"] == 0, "what workers were forked from has ended"
    assert without_memory(alone) == without_memory(together)
    assert {pid for pid, *_ in calls(tmp_path, "alone")}.isdisjoint(pid for pid, *_ in calls(tmp_path, "together"))
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "encoded").glob("*/*")}
        for name in ("alone", "together")
    ]
    assert files[0] == files[1] and "digests.json" in files[0]


@pytest.mark.slow
def test_the_same_bad_rows_are_told_however_many_processes_find_them(encoded, tmp_path):
    results = [encoded(name, bad=[42, 45, 90], **options) for name, options in (("one", {}), ("two", {"workers": 2}))]
    assert results == 2 * [{"error": "rows:42: is bad\n  also rows:45\n2 of 72 rows are refused\nhint: correct it"}]
    assert not list((tmp_path / "two/encoded").iterdir())


@pytest.mark.slow
def test_skipped_rows_are_the_same_however_many_processes_find_them(encoded):
    bad = {"bad": [42, 45, 70], "skips_bad": True}
    results = [
        without_memory(encoded(name, **bad, **options)) for name, options in (("one", {}), ("two", {"workers": 2}))
    ]
    assert results[0] == results[1] and results[0]["bad"] == ["rows:42", "rows:45", "rows:70"]
    assert results[0]["examples"] == 97


@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_after_a_kill_only_what_was_not_finished_is_encoded(start, encoded, tmp_path, workers):
    process = start(hangs_at=50, workers=workers)
    wait_until(lambda: (tmp_path / "cache.log").exists() and any(first == 48 for _, first, _ in calls(tmp_path)))
    finished = set((tmp_path / "cache/encoded").glob("*.building/rows-*-*[0-9]"))
    process.kill()
    process.communicate()
    assert len(finished) >= 5
    (tmp_path / "cache.log").unlink()
    result = encoded(workers=workers)
    starts = {int(path.name.split("-")[1]) for path in finished}
    assert starts.isdisjoint(first for _, first, _ in calls(tmp_path))
    assert without_memory(result) == without_memory(encoded("whole"))
    [entry] = (tmp_path / "cache/encoded").iterdir()
    assert all(file.is_file() for file in entry.iterdir())


def test_workers_do_not_outlive_a_killed_parent(start, tmp_path):
    process = start(hangs_at=50, workers=2)
    wait_until(lambda: (tmp_path / "cache.log").exists() and any(first == 48 for _, first, _ in calls(tmp_path)))
    workers = {pid for pid, *_ in calls(tmp_path)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_encoding_and_its_work_is_kept(start, tmp_path):
    process = start(hangs_at=50, workers=2)
    wait_until(lambda: (tmp_path / "cache.log").exists() and any(first == 48 for _, first, _ in calls(tmp_path)))
    os.kill(next(pid for pid, first, _ in calls(tmp_path) if first == 48), signal.SIGKILL)
    _, error = process.communicate(timeout=100)
    assert "a process that encoded rows was killed" in error
    assert list((tmp_path / "cache/encoded").glob("*.building/rows-0-8"))


def test_a_shard_that_was_damaged_is_encoded_again(start, encoded, tmp_path):
    process = start(hangs_at=50)
    wait_until(lambda: (tmp_path / "cache.log").exists() and any(first == 48 for _, first, _ in calls(tmp_path)))
    process.kill()
    process.communicate()
    [shard] = (tmp_path / "cache/encoded").glob("*.building/rows-8-16")
    tokens = bytearray((shard / "tokens.raw").read_bytes())
    tokens[3] ^= 1
    (shard / "tokens.raw").write_bytes(tokens)
    (tmp_path / "cache.log").unlink()
    assert without_memory(encoded()) == without_memory(encoded("whole"))
    assert [first for _, first, _ in calls(tmp_path)][:2] == [8, 48]


def test_two_processes_that_want_the_same_rows_encode_them_once(start, tmp_path):
    processes = [start(rows=2000, shard=500) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
    assert without_memory(results[0]) == without_memory(results[1])
    firsts = [first for _, first, _ in calls(tmp_path)]
    assert sorted(firsts) == sorted(set(firsts)) and len(firsts) == 4


@pytest.mark.slow
def test_a_recipe_is_encoded_by_workers_as_by_one_process(recipe_file, chat_data, tmp_path, monkeypatch):
    recipe = load(recipe_file(data={"train": [{"path": str(chat_data / "train.jsonl")}], "holdout": 4}))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "alone"))
    alone = resolve(recipe)
    monkeypatch.setattr(encoding, "SHARD_ROWS", 4)
    monkeypatch.setattr(encoding, "PARALLEL_ROWS", 0)
    monkeypatch.setattr(encoding, "workers", lambda: 2)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "together"))
    together = resolve(recipe)
    assert alone.plan == together.plan
    digests = [
        sorted(file.read_text() for file in tmp_path.glob(f"{name}/encoded/*/digests.json"))
        for name in ("alone", "together")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 1


def test_what_a_worker_opens_encodes_as_here(recipe_file, monkeypatch):
    seen = []
    monkeypatch.setattr(
        in_training,
        "encode",
        lambda *given, **options: seen.append((given, options)) or encode(*given, content=options["content"]),
    )
    resolve(load(recipe_file()))
    for (rows, where, encoder, *_), options in seen:
        there = pickle.loads(pickle.dumps(options["reopen"]))()  # noqa: S301
        assert [there.where(row) for row in range(len(rows))] == [where(row) for row in range(len(rows))]
        assert list(there.rows) == list(rows)
        places = [where(row) for row in range(len(rows))]
        for (mine,), (theirs,) in zip(encoder(list(rows), places), there.encoder(list(rows), places), strict=True):
            assert np.array_equal(mine.tokens, theirs.tokens) and np.array_equal(mine.supervised, theirs.supervised)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(encoded):
    few, many = (
        encoded(name, is_measured=True, rows=rows, shard=4096) for name, rows in (("few", 30_000), ("many", 300_000))
    )
    assert many["examples"] == 300_000
    assert many["most_bytes"] - few["most_bytes"] < 4 << 20
