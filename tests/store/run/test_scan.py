"""A journal of any length is read without being held."""

import json
import tracemalloc

import pytest

from finetune.errors import RunError
from finetune.store.run import journal, scan

STEPS = 5_000


def lines(steps):
    for step in steps:
        figures = {"loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-3, "tokens": 10, "supervised_tokens": 5}
        yield {"kind": "step", "step": step, **figures, "seconds": 0.1, "attempt": "a", "time": "2026-01-01"}


def event(name, step, **more):
    return {"kind": "event", "event": name, "attempt": "a", "time": "2026-01-01", "step": step, **more}


def written(run, *records, tail=""):
    (run / "journal.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + tail)


def test_it_finds_what_reading_all_of_it_finds(tmp_path) -> None:
    rollback = event("amended", 9, action="rollback", first=8, last=9, to=6)
    again = [json.loads(json.dumps(each)) | {"attempt": "b", "loss": 7.0} for each in lines([4, 5])]
    written(tmp_path, event("started", 0), *lines(range(1, 6)), *again, *lines(range(6, 10)), rollback, *lines([7, 8]))
    records, found = journal.read(tmp_path), scan.read(tmp_path)
    assert dict(found.steps) == journal.steps(records) and found.steps[4]["loss"] == 7.0
    assert found.events == [record for record in records if record["kind"] != "step"] == scan.events(tmp_path)
    assert (len(found.steps), 9 in found.steps, found.steps.get(9)) == (8, False, None)
    assert list(found.steps.since(7)) == [7, 8] and found.steps.since(7)[8] == found.steps[8]
    assert scan.attempts(tmp_path) == {"a": 14, "b": 7}


@pytest.mark.parametrize(
    "tail", ["", '{"kind": "step", "st', '{"kind": "step", "step": 3, "loss": 1.0}', "\0\0\n", '{"k\n{"ki\n']
)
def test_a_torn_end_is_left_out(tmp_path, tail) -> None:
    written(tmp_path, *lines([1, 2]), event("committed", 2), tail=tail)
    assert list(scan.read(tmp_path).steps) == [1, 2]
    assert scan.events(tmp_path) == [event("committed", 2)]


def test_a_broken_line_is_named_at_once_or_when_its_step_is_asked_for(tmp_path) -> None:
    written(tmp_path, *lines([1]), tail="".join(["?\n", f"{json.dumps(event('committed', 1))}\n"]))
    with pytest.raises(RunError, match="is not a record of a journal") as caught:
        scan.read(tmp_path)
    assert caught.value.where.endswith("journal.jsonl:2")
    written(tmp_path, *lines([1]), tail='{"kind": "step", "step": 2, "loss": oops}\n')
    found = scan.read(tmp_path).steps
    assert found[1]["loss"] == 1.0
    with pytest.raises(RunError, match="the record of step 2 is damaged"):
        found[2]


def test_a_run_without_a_journal_has_nothing(tmp_path) -> None:
    assert scan.read(tmp_path)[:1] == ([],) and not scan.read(tmp_path).steps and scan.attempts(tmp_path) == {}


def test_a_step_costs_about_a_hundred_bytes_of_memory(tmp_path) -> None:
    written(tmp_path, *lines(range(1, STEPS + 1)))
    tracemalloc.start()
    try:
        found = scan.read(tmp_path)
        assert found.steps[STEPS]["step"] == STEPS
        _, most = tracemalloc.get_traced_memory()
        assert sum(record["tokens"] for record in found.steps.values()) == 10 * STEPS
        _, after = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(most, after) < 200 * STEPS
