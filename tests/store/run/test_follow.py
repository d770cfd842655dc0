"""A journal is read while it grows: each record once, and a torn end when it is whole."""

import pytest

from finetune.errors import RunError
from finetune.store.run.follow import Follower
from tests.compare.made_runs import made, step, write


def losses(follower: Follower) -> list[float]:
    return [line.record["loss"] for line in follower.read()]


def test_each_record_is_read_once(tmp_path) -> None:
    run = made(tmp_path / "run", 9)
    follower = Follower(run)
    assert losses(follower) == []
    write(run, [step(1, 3.0), step(2, 2.0)])
    assert losses(follower) == [3.0, 2.0]
    assert losses(follower) == []
    write(run, [step(3, 1.0)])
    assert losses(follower) == [1.0]


def test_a_torn_line_is_read_when_it_is_whole_or_cut_off(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(1, 3.0)])
    journal, line = run / "journal.jsonl", step(2, 2.0)
    follower = Follower(run)
    with journal.open("a") as file:
        file.write(line[:30])
    assert losses(follower) == [3.0]
    with journal.open("a") as file:
        file.write(line[30:] + "\n" + "\0" * 50 + "\n")
    assert losses(follower) == [2.0]
    journal.write_bytes(journal.read_bytes().replace(b"\0" * 50 + b"\n", b""))
    write(run, [step(3, 1.0)])
    assert not follower.is_replaced
    assert losses(follower) == [1.0]


def test_a_broken_line_before_a_sound_one_is_named(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(1, 3.0), "{", "{", step(2, 2.0)])
    with pytest.raises(RunError, match="journal.jsonl:2: is not a record"):
        losses(Follower(run))


def test_another_file_in_its_place_is_noticed(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(1, 3.0), step(2, 2.0)])
    follower = Follower(run)
    losses(follower)
    (run / "journal.jsonl").write_text(step(1, 3.0) + "\n")
    assert follower.is_replaced
    (run / "journal.jsonl").unlink()
    assert follower.is_replaced
