"""What is finer than a line of the journal: written by span, read by step, and of several records the one that counts."""

import math
import subprocess
import sys

import pytest

from finetune.store.run import parts
from finetune.store.run.journal import Journal
from finetune.store.run.row_losses import Columns, ModuleNorms, Reader, RowLoss, read_rows


def row(step, example, loss=1.0):
    return RowLoss(step, example, 10 + example, loss, 7)


def norms(step, *values):
    return ModuleNorms(step, {f"layers.{number}": value for number, value in enumerate(values)})


def test_row_losses_are_written_by_span_and_read_by_step(tmp_path):
    Columns([row(1, 5), row(1, 3), row(2, 4, math.nan)]).write(tmp_path, "a")
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["step-00000001-00000002.parquet"]
    assert read_rows(tmp_path, 1) == [row(1, 5), row(1, 3)]
    assert math.isnan(read_rows(tmp_path, 2)[0].loss)
    assert read_rows(tmp_path, 3) == []
    Columns([row(3, 9)]).write(tmp_path, "a")
    assert read_rows(tmp_path, 3) == [row(3, 9)]
    assert read_rows(tmp_path, 4) == []


def test_gradient_norms_of_modules_are_written_beside_them(tmp_path):
    (Columns([row(1, 5)], [norms(1, 0.1 + 0.2, 3.0)]) + Columns([row(2, 6)], [norms(2, math.nan, 1e-310)])).write(
        tmp_path, "a"
    )
    assert Reader(tmp_path).modules(1) == {"layers.0": 0.1 + 0.2, "layers.1": 3.0}
    found = Reader(tmp_path).modules(2)
    assert math.isnan(found["layers.0"]) and found["layers.1"] == 1e-310
    assert Reader(tmp_path).modules(3) == {}


@pytest.mark.slow
def test_writing_them_loads_no_pandas_beside_a_training(tmp_path):
    code = """
import sys
from pathlib import Path
from finetune.store.run.row_losses import Columns, ModuleNorms, RowLoss
for step in (1, 2):
    Columns([RowLoss(step, 5, 15, 1.0, 7)], [ModuleNorms(step, {"layers.0": 1.0})]).write(Path(sys.argv[1]), "a")
sys.exit("pandas" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert Reader(tmp_path).modules(1) == {"layers.0": 1.0}


def test_columns_without_a_step_write_nothing(tmp_path):
    Columns().write(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attempts", ["ab", "ba"])
def test_of_two_files_that_cover_a_step_that_of_the_later_attempt_counts_whatever_the_clock_said(tmp_path, attempts):
    writer = Journal(tmp_path)
    for attempt in attempts:
        writer.append({"kind": "step", "step": 2, "attempt": attempt})
    for first, loss, attempt in ((2, 1.0, "a"), (1, 2.0, "b")):
        Columns([row(first, 0, loss), row(2, 1, loss)]).write(tmp_path, attempt)
    assert read_rows(tmp_path, 2)[-1] == row(2, 1, 2.0 if attempts[-1] == "b" else 1.0)


def test_of_two_files_of_one_attempt_the_later_one_counts(tmp_path, monkeypatch):
    """A rollback runs steps again within one attempt."""
    Journal(tmp_path).append({"kind": "step", "step": 2, "attempt": "a"})
    for first, loss, time in ((1, 2.0, "2026-01-02"), (2, 1.0, "2026-01-01")):
        monkeypatch.setattr("finetune.store.run.journal.now", lambda time=time: time)
        Columns([row(first, 0, loss), row(2, 1, loss)]).write(tmp_path, "a")
    assert read_rows(tmp_path, 2)[-1] == row(2, 1, 2.0)


def test_what_a_rollback_gave_up_counts_no_more(tmp_path, monkeypatch):
    writer = Journal(tmp_path)
    for first, time, loss in ((1, "2026-01-01", 1.0), (3, "2026-01-02", 2.0)):
        monkeypatch.setattr("finetune.store.run.journal.now", lambda time=time: time)
        Columns([row(first, 0, loss), row(first + 1, 1, loss)]).write(tmp_path, "a")
    about = {"kind": "event", "event": "amended", "action": "rollback", "time": "2026-01-03"}
    writer.append(about | {"first": 4, "last": 4, "to": 2, "step": 4})
    assert read_rows(tmp_path, 2)[0].loss == 1.0 and read_rows(tmp_path, 3) == []
    monkeypatch.setattr("finetune.store.run.journal.now", lambda: "2026-01-04")
    Columns([row(3, 0, 5.0)]).write(tmp_path, "a")
    assert read_rows(tmp_path, 3)[0].loss == 5.0


def names(directory):
    return [path.name for path in sorted(directory.iterdir())]


@pytest.mark.slow
def test_the_number_of_files_does_not_grow_with_that_of_saves(tmp_path):
    for step in range(1, 201):
        Columns([row(step, step % 7, step / 7), row(step, 8)], [norms(step, step / 3)]).write(
            tmp_path, f"a{step // 50}"
        )
        assert len(names(tmp_path / "rows")) <= 8 >= len(names(tmp_path / "modules"))
    reader = Reader(tmp_path)
    for step in (1, 2, 77, 128, 129, 200):
        assert reader.rows(step) == [row(step, step % 7, step / 7), row(step, 8)]
        assert reader.modules(step) == {"layers.0": step / 3}
    assert reader.rows(201) == []


def test_a_directory_of_many_small_files_shrinks_with_the_next_save(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_mergeable", lambda *_: ([], []))  # as older code wrote them
    for step in range(1, 100):
        Columns([row(step, step)]).write(tmp_path, "a")
    assert len(names(tmp_path / "rows")) == 99
    monkeypatch.undo()
    Columns([row(100, 100)]).write(tmp_path, "b")
    assert names(tmp_path / "rows") == ["step-00000001-00000100.parquet"]
    assert [read_rows(tmp_path, step) for step in (1, 50, 100)] == [[row(step, step)] for step in (1, 50, 100)]


def test_a_merge_holds_and_writes_no_more_than_a_few_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SEALED_BYTES", 1)
    for step in range(1, 5):
        Columns([row(step, step)]).write(tmp_path, "a")
    assert len(names(tmp_path / "rows")) == 4


def test_one_step_of_a_large_file_is_read_without_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP", 4)
    Columns([row(step, example) for step in range(1, 101) for example in range(3)]).write(tmp_path, "a")
    reader = Reader(tmp_path)
    assert reader.rows(50) == [row(50, example) for example in range(3)]
    assert reader._rows._held[1].num_rows <= 8
    assert [reader.rows(step) for step in range(1, 101)] == [[row(step, e) for e in range(3)] for step in range(1, 101)]


def test_a_merge_does_not_bring_back_what_a_later_attempt_ran_again(tmp_path):
    writer = Journal(tmp_path)
    for attempt in "ab":
        writer.append({"kind": "step", "step": 2, "attempt": attempt})
    for first, last, attempt in ((1, 2, "a"), (3, 6, "a"), (3, 4, "b"), (5, 8, "b"), (9, 12, "b"), (13, 16, "b")):
        loss = 1.0 if attempt == "a" else 2.0
        Columns([row(step, 0, loss) for step in range(first, last + 1)]).write(tmp_path, attempt)
        found = [read_rows(tmp_path, step)[0].loss for step in range(1, last + 1)]
        assert found == [1.0] * 2 + ([1.0] * 4 if attempt == "a" else [2.0] * (last - 2))[: last - 2]
    assert len(names(tmp_path / "rows")) <= 3


def test_what_a_kill_in_a_merge_left_behind_counts_no_more_and_goes(tmp_path, monkeypatch):
    Columns([row(1, 0, 1.0)]).write(tmp_path, "a")
    left = (tmp_path / "rows/step-00000001-00000001.parquet").read_bytes()
    Columns([row(2, 0, 2.0)]).write(tmp_path, "a")
    (tmp_path / "rows/step-00000001-00000001.parquet").write_bytes(left)
    assert read_rows(tmp_path, 1) == [row(1, 0, 1.0)] and read_rows(tmp_path, 2) == [row(2, 0, 2.0)]
    Columns([row(3, 0), row(4, 0)]).write(tmp_path, "b")
    assert names(tmp_path / "rows") == ["step-00000001-00000004.parquet"]
    assert read_rows(tmp_path, 1) == [row(1, 0, 1.0)]


def test_a_reader_goes_on_where_a_training_merges_meanwhile(tmp_path):
    Columns([row(1, 0, 1.0)]).write(tmp_path, "a")
    reader = Reader(tmp_path)
    Columns([row(2, 0, 2.0)]).write(tmp_path, "a")
    assert reader.rows(1) == [row(1, 0, 1.0)] and reader.rows(2) == [row(2, 0, 2.0)]


def test_what_a_rollback_gave_up_does_not_come_back_with_a_merge(tmp_path, monkeypatch):
    writer = Journal(tmp_path)
    writer.append({"kind": "step", "step": 1, "attempt": "a"})
    times = iter(f"2026-01-{day:02}" for day in range(1, 20))
    monkeypatch.setattr("finetune.store.run.journal.now", lambda: next(times))

    def write(first, last, loss):
        Columns([row(step, 0, loss) for step in range(first, last + 1)]).write(tmp_path, "a")

    write(1, 4, 1.0)
    write(5, 7, 1.0)  # at the rollback, to step 4
    about = {"kind": "event", "event": "amended", "action": "rollback", "attempt": "a", "time": next(times)}
    writer.append(about | {"first": 6, "last": 7, "to": 4, "step": 7})
    write(5, 6, 2.0)
    assert [bool(read_rows(tmp_path, step)) for step in range(1, 8)] == [True] * 6 + [False]
    write(7, 10, 2.0)
    write(11, 20, 2.0)
    assert [read_rows(tmp_path, step)[0].loss for step in range(1, 21)] == [1.0] * 4 + [2.0] * 16
