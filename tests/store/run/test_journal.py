"""The journal survives a torn end, stays strict JSON, and says when a step was not exact."""

import errno
import json
import math

import pytest

from finetune.errors import RunError
from finetune.store.run import journal
from finetune.store.run.journal import Journal, difference, end_since, read, steps


def step(number, **fields):
    return {"kind": "step", "step": number, **fields}


def written(run, *records):
    writer = Journal(run)
    for record in records:
        writer.append(record)
    writer.sync()
    writer.close()


def test_records_come_back_in_order_and_floats_to_the_bit(tmp_path):
    records = [step(1, loss=0.1 + 0.2), {"kind": "event", "event": "committed", "step": 1}, step(2, loss=1e-310)]
    written(tmp_path, *records[:1])
    written(tmp_path, *records[1:])
    assert read(tmp_path) == records
    assert (
        (tmp_path / "journal.jsonl")
        .read_text()
        .startswith('{"kind": "step", "step": 1, "loss": 0.30000000000000004}\n')
    )


def test_a_run_without_a_journal_has_no_records(tmp_path):
    assert read(tmp_path) == []


def test_non_finite_floats_leave_strict_json(tmp_path):
    written(tmp_path, step(1, loss=math.nan, norms=[math.inf, -math.inf]))
    line = (tmp_path / "journal.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == step(1, loss="nan", norms=["inf", "-inf"])


def test_wherever_the_last_line_is_torn_it_is_left_out_and_cut_off(tmp_path):
    written(tmp_path, step(1), step(2, loss=2.5))
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert read(tmp_path) == [step(1)]
        written(tmp_path, step(3))
        assert read(tmp_path) == [step(1), step(3)]


@pytest.mark.parametrize("tail", [b"\0\0\0", b"\0\0\n", b'{"kind": "st\n{"ki\n', b"17\n", b"\xff\n"])
def test_a_tail_that_is_no_record_is_cut_off(tmp_path, tail):
    written(tmp_path, step(1))
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(tail)
    assert read(tmp_path) == [step(1)]
    written(tmp_path, step(2))
    assert read(tmp_path) == [step(1), step(2)]


def is_step_2(record):
    return record["step"] == 2


def test_the_end_of_a_journal_is_read_without_what_is_before(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "END_BYTES", 100)  # three records of these
    written(tmp_path, step(2), step(1), *(step(number) for number in range(2, 5)))
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"?" + path.read_bytes()[1:])  # a line that nobody may look at
    assert end_since(tmp_path, is_step_2) == [step(2), step(3), step(4)]
    with path.open("ab") as file:
        file.write(b'{"kind": "st')
    assert end_since(tmp_path, is_step_2) == [step(2), step(3), step(4)]
    written(tmp_path, step(5))
    assert end_since(tmp_path, lambda record: record["step"] == 4) == [step(4), step(5)]


def test_where_its_end_has_no_such_record_the_end_of_a_journal_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "END_BYTES", 40)
    assert end_since(tmp_path, is_step_2) is None
    written(tmp_path, step(1), step(2), step(3), step(4))
    assert end_since(tmp_path, is_step_2) is None


def test_a_torn_line_longer_than_the_end_that_is_read_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "END_BYTES", 40)
    written(tmp_path, step(1), step(2))
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"kind": "event", "rows": [' + b"1, " * 100)
    assert read(tmp_path) == [step(1), step(2)]
    written(tmp_path, step(3))
    assert read(tmp_path) == [step(1), step(2), step(3)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    written(tmp_path, step(1), step(2), step(3))
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"kind": "step", "step": 2', b'{"kind": "step", "step" 2'))
    with pytest.raises(RunError, match=r"journal.jsonl:2: is not a record of a journal\nhint: the file is damaged"):
        read(tmp_path)


def test_records_that_do_not_fit_on_the_disk_wait_and_leave_no_half(tmp_path, monkeypatch):
    writer = Journal(tmp_path)
    writer.append(step(1))
    real_write = journal.os.write
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", lambda descriptor, data: real_write(descriptor, data[:10]))
        writer.append(step(2))
        assert read(tmp_path) == [step(1)]
        full = "journal.jsonl: cannot write: no space left on device\nhint: free some space"
        with pytest.raises(RunError, match=full) as caught:
            writer.sync()
    assert caught.value.__cause__.errno == errno.ENOSPC
    writer.append(step(3))
    assert read(tmp_path) == [step(1), step(2), step(3)]
    writer.close()


def test_a_directory_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(RunError, match="journal.jsonl: cannot write: is a directory"):
        Journal(tmp_path)


def test_the_last_record_of_a_step_counts():
    records = [
        step(1, attempt="a"),
        step(2, attempt="a"),
        {"kind": "event", "event": "resumed", "step": 1},
        step(2, attempt="b"),
    ]
    assert steps(records) == {1: step(1, attempt="a"), 2: step(2, attempt="b")}


def test_an_exact_step_differs_in_times_and_attempt_only():
    old = step(1, loss=0.5, rows=["a", "b"], norm="nan", time="10:00", seconds=1.0, attempt="a", save_seconds=2.0)
    new = step(
        1, loss=0.5, rows=("a", "b"), norm=math.nan, time="11:00", seconds=1.5, attempt="b", tokens_per_second=9.0
    )
    assert difference(old, new) is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"loss": math.nextafter(0.5, 1)}, "loss"),
        ({"rows": ["b"]}, "rows"),
        ({"extra": 1}, "extra"),
        ({"step": 2, "loss": 1}, "step"),
    ],
)
def test_the_first_field_that_differs_is_named(change, field):
    old = step(1, loss=0.5, rows=["a"])
    assert difference(old, old | change) == difference(old | change, old) == field
