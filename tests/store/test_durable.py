"""What is written durably is whole, hashed and read-only, whether or not the file system takes writes past its cache."""

import errno
import mmap
import os
from array import array
from pathlib import Path

import blake3
import pytest

from finetune.store import durable as module
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.verify import is_as_recorded
from finetune.store.durable import BUFFER_BYTES, durable, open_uncached, rename, replace_file, replacing

SIZES = [0, 1, 4095, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES + 4097]


def written(path: Path, data: bytes, piece: int = 1 << 20) -> module.HashedFile:
    with durable(path) as file:
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])
    return file


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [1 << 20, 999_983])
def test_every_byte_is_there_and_in_the_digest(tmp_path: Path, size: int, piece: int) -> None:
    data = os.urandom(size)
    file = written(tmp_path / "file", data, piece)
    assert (tmp_path / "file").read_bytes() == data and file.bytes == size
    assert file.digest() == f"blake3:{blake3.blake3(data).hexdigest()}"
    assert is_as_recorded(tmp_path / "file", FileRecord(size, file.digest(), ()))
    pages = mmap.mmap(-1, 3 * BUFFER_BYTES)
    with os.fdopen(open_uncached(tmp_path / "file"), "rb", buffering=0) as reader:
        assert pages[: reader.readinto(pages)] == data


def test_numbers_of_any_format_are_written_as_their_bytes(tmp_path: Path) -> None:
    numbers = array("f", [1.5, -2.0])
    with durable(tmp_path / "file") as file:
        file.write(memoryview(numbers))
        file.write(memoryview(array("d")))
    assert (tmp_path / "file").read_bytes() == numbers.tobytes() and file.bytes == 8


def test_a_file_is_read_only_and_never_written_over(tmp_path: Path) -> None:
    written(tmp_path / "file", b"first")
    assert (tmp_path / "file").stat().st_mode & 0o222 == 0
    with pytest.raises(FileExistsError):
        written(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"


def test_a_file_system_that_refuses_writes_past_its_cache_gets_usual_ones(tmp_path: Path, monkeypatch) -> None:
    """As a disk with larger sectors does: the flag is taken, the write is not."""
    data, plain, refused = os.urandom(BUFFER_BYTES + 5), os.write, []

    def write(descriptor, view):
        if module.fcntl.fcntl(descriptor, module.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(view))
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, view)

    monkeypatch.setattr(module.os, "write", write)
    file = written(tmp_path / "file", data)
    assert refused == [BUFFER_BYTES] and (tmp_path / "file").read_bytes() == data
    assert file.digest() == f"blake3:{blake3.blake3(data).hexdigest()}"


def test_a_write_that_takes_less_than_it_is_given_is_continued(tmp_path: Path, monkeypatch) -> None:
    data, plain = os.urandom(2 * BUFFER_BYTES + 7), os.write
    monkeypatch.setattr(module.os, "write", lambda descriptor, view: plain(descriptor, view[: 4096 * 100 + 4096]))
    written(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_an_error_of_the_disk_comes_through(tmp_path: Path, monkeypatch) -> None:
    def write(descriptor, view):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "write", write)
    with pytest.raises(OSError, match="Input/output error"):
        written(tmp_path / "file", b"x")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"first")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the sec")
        raise RuntimeError
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"


def test_a_rename_that_may_not_be_on_the_disk_is_taken_back(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "old").mkdir()
    rename(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]

    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "sync_directory", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        rename(tmp_path / "new", tmp_path / "other")
    assert os.listdir(tmp_path) == ["new"]
