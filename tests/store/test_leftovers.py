import fcntl
import os
from pathlib import Path

import pytest

from finetune.store import leftovers


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in the Hub's cache with a whole file, and one that a download left long ago."""
    folder = tmp_path / "hub" / "models--owner--name"
    (folder / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / ".locks" / folder.name).mkdir(parents=True)
    (folder / "blobs" / "c0ffee").write_bytes(b"whole")
    (folder / "blobs" / "abc123.0fe1.incomplete").write_bytes(b"wh")
    os.utime(folder / "blobs" / "abc123.0fe1.incomplete", (1, 1))
    return folder


def left(repository: Path) -> list[str]:
    leftovers.remove(repository)
    return sorted(file.name for file in (repository / "blobs").iterdir())


def test_what_a_killed_download_left_is_removed(repository) -> None:
    assert left(repository) == ["c0ffee"]


def test_what_a_download_of_another_process_writes_stays(repository) -> None:
    with (repository.parent / ".locks" / repository.name / "abc123.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert left(repository) == ["abc123.0fe1.incomplete", "c0ffee"]
    assert left(repository) == ["c0ffee"]


def test_what_was_written_a_moment_ago_stays_as_it_may_be_of_another_host(repository) -> None:
    os.utime(repository / "blobs" / "abc123.0fe1.incomplete")
    assert left(repository) == ["abc123.0fe1.incomplete", "c0ffee"]


def test_a_repository_that_is_not_in_the_cache_has_nothing_left(tmp_path) -> None:
    leftovers.remove(tmp_path / "models--owner--none")
