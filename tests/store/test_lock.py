import errno
import fcntl
import os

import pytest

from finetune.store import lock


def opened(path) -> int:
    return os.open(path, os.O_RDONLY)


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    assert lock.take(one)
    with pytest.raises(BlockingIOError):
        lock.take(two)
    os.close(one)
    assert lock.take(two, is_waiting=True)
    os.close(two)


@pytest.mark.parametrize("number", sorted(lock.NO_LOCKS))
def test_a_file_system_without_locks_is_told_from_a_lock_that_is_held(tmp_path, monkeypatch, number) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    descriptor = opened(tmp_path)
    assert not lock.take(descriptor)
    assert not lock.take(descriptor, is_waiting=True)
    os.close(descriptor)


def test_any_other_refusal_is_an_error(tmp_path) -> None:
    descriptor = opened(tmp_path)
    os.close(descriptor)
    with pytest.raises(OSError) as refused:
        lock.take(descriptor)
    assert refused.value.errno == errno.EBADF


def test_a_lock_is_seen_while_its_holder_lives_and_looking_takes_nothing(tmp_path) -> None:
    path = tmp_path / "lock"
    assert not lock.is_held(path)
    with path.open("w") as file:
        assert not lock.is_held(path)
        assert lock.take(file.fileno())
        assert lock.is_held(path)
    assert not lock.is_held(path)
