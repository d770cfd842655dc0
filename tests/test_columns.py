"""What is finer than a line of the journal: written by span, read by step, and of several records the one that counts."""

import math
import subprocess
import sys

import pytest

from finetune.columns import Columns, ModuleNorms, RowLoss, read_modules, read_rows
from finetune.journal import Journal


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
    assert read_modules(tmp_path, 1) == {"layers.0": 0.1 + 0.2, "layers.1": 3.0}
    found = read_modules(tmp_path, 2)
    assert math.isnan(found["layers.0"]) and found["layers.1"] == 1e-310
    assert read_modules(tmp_path, 3) == {}


def test_writing_them_loads_no_pandas_beside_a_training(tmp_path):
    code = """
import sys
from pathlib import Path
from finetune.columns import Columns, ModuleNorms, RowLoss
Columns([RowLoss(1, 5, 15, 1.0, 7)], [ModuleNorms(1, {"layers.0": 1.0})]).write(Path(sys.argv[1]), "a")
sys.exit("pandas" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert read_modules(tmp_path, 1) == {"layers.0": 1.0}


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
        monkeypatch.setattr("finetune.journal.now", lambda time=time: time)
        Columns([row(first, 0, loss), row(2, 1, loss)]).write(tmp_path, "a")
    assert read_rows(tmp_path, 2)[-1] == row(2, 1, 2.0)


def test_what_a_rollback_gave_up_counts_no_more(tmp_path, monkeypatch):
    writer = Journal(tmp_path)
    for first, time, loss in ((1, "2026-01-01", 1.0), (3, "2026-01-02", 2.0)):
        monkeypatch.setattr("finetune.journal.now", lambda time=time: time)
        Columns([row(first, 0, loss), row(first + 1, 1, loss)]).write(tmp_path, "a")
    about = {"kind": "event", "event": "amended", "action": "rollback", "time": "2026-01-03"}
    writer.append(about | {"first": 4, "last": 4, "to": 2, "step": 4})
    assert read_rows(tmp_path, 2)[0].loss == 1.0 and read_rows(tmp_path, 3) == []
    monkeypatch.setattr("finetune.journal.now", lambda: "2026-01-04")
    Columns([row(3, 0, 5.0)]).write(tmp_path, "a")
    assert read_rows(tmp_path, 3)[0].loss == 5.0
