"""Who holds a run, and when its process is certainly dead."""

import json
import os
from dataclasses import asdict, replace

import pytest

from finetune.store.run import holder as holders


@pytest.fixture
def this_process():
    return holders.this_process("first", beat="000000000009")


def test_a_holder_is_read_as_it_was_written_and_each_beat_changes_digits_only(tmp_path, this_process):
    path = tmp_path / "lease.json"
    with path.open("wb") as file:
        holders.write(file.fileno(), this_process)
        before = path.read_bytes()
        assert holders.read(path) == this_process
        holders.write(file.fileno(), replace(this_process, beat="000000000010"))
    after = path.read_bytes()
    assert len(before) == len(after)
    assert [(old, new) for old, new in zip(before, after, strict=True) if old != new] == [(48, 49), (57, 48)]


def test_a_holder_that_nobody_wrote_down_is_none_and_one_that_cannot_be_read_is_unknown(tmp_path, this_process):
    path = tmp_path / "lease.json"
    assert holders.read(path) is None
    for text in ("", "{", "[]", '{"host": 1}', json.dumps(asdict(this_process) | {"later": 1})):
        path.write_text(text)
        assert holders.read(path) == holders.UNKNOWN
    assert str(holders.UNKNOWN) == "another process"


@pytest.mark.parametrize(
    "changes",
    [
        {"pid_namespace": "pid:[1]", "pid": 2**30},
        {"host": "elsewhere", "pid": 2**30},
        {},
    ],
    ids=["another container", "another host", "alive"],
)
def test_a_process_whose_death_is_not_certain_is_not_taken_for_dead(this_process, changes):
    assert not holders.is_dead_here(replace(this_process, **changes))


@pytest.mark.parametrize("changes", [{"pid": 2**30}, {"start_ticks": 1}], ids=["ended", "its pid is used again"])
def test_a_process_of_this_boot_that_ended_is_dead(this_process, changes):
    assert holders.is_dead_here(replace(this_process, **changes))


def test_a_process_of_another_user_is_not_taken_for_dead(monkeypatch, this_process):
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not holders.is_dead_here(replace(this_process, pid=1, start_ticks=0))


def test_where_the_system_has_no_boot_id_nobody_is_taken_for_dead(monkeypatch, tmp_path):
    monkeypatch.setattr("finetune.store.boot.BOOT_ID", tmp_path / "none")
    assert not holders.is_dead_here(replace(holders.this_process("first", beat=None), pid=2**30))
