"""An entry of the cache is whole or not there; it is made once, whoever wants it; what killed builds leave is used or removed."""

import fcntl
import os
import platform
import shutil

import pytest

from finetune.store import cache


@pytest.fixture(autouse=True)
def kind(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "kind").mkdir()
    return tmp_path / "kind"


@pytest.fixture
def hashed(monkeypatch):
    """The names of files that were hashed since."""
    names, digest = [], cache._digest
    monkeypatch.setattr(cache, "_digest", lambda file: names.append(file.name) or digest(file))
    return names


def write(directory):
    (directory / "file").write_bytes(b"content")


def refuse(directory):
    raise AssertionError("it is there already")


def flip(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def unfinished(kind, key="key"):
    return kind / f"{key}.{os.getuid()}-{platform.node()}.building"


def test_a_sound_entry_is_not_made_again_and_a_damaged_one_is(kind):
    entry = cache.built("kind", "key", write)
    assert cache.built("kind", "key", refuse) == entry
    flip(entry / "file")
    assert (cache.built("kind", "key", write) / "file").read_bytes() == b"content"
    (entry / "file").unlink()
    assert (cache.built("kind", "key", write) / "file").read_bytes() == b"content"
    assert list(kind.iterdir()) == [entry]


def test_a_small_entry_is_hashed_at_every_use(hashed):
    cache.built("kind", "key", write)
    hashed.clear()
    cache.built("kind", "key", refuse)
    assert hashed == ["file"]


def test_a_large_entry_is_hashed_once_a_boot_and_after_every_write(hashed, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "STAMPED_BYTES", 1)
    entry = cache.built("kind", "key", write)
    hashed.clear()
    cache.built("kind", "key", refuse)
    assert hashed == ["file"]  # the first use reads what the build wrote
    cache.built("kind", "key", refuse)
    assert hashed == ["file"]
    os.utime(entry / "file")  # the time of writing alone
    cache.built("kind", "key", refuse)
    assert hashed == ["file", "file"]
    boot = tmp_path / "boot_id"
    boot.write_text("another")
    monkeypatch.setattr("finetune.store.boot.BOOT_ID", boot)
    cache.built("kind", "key", refuse)
    assert hashed == ["file", "file", "file"]
    facts = (entry / "file").stat()
    flip(entry / "file")
    os.utime(entry / "file", ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the kernel keeps a time that nobody sets
    assert (cache.built("kind", "key", write) / "file").read_bytes() == b"content"


def test_a_large_entry_of_a_cache_that_cannot_be_written_is_hashed_at_every_use(hashed, monkeypatch):
    monkeypatch.setattr(cache, "STAMPED_BYTES", 1)
    entry = cache.built("kind", "key", write)
    (entry.parent / "key.verified.new").mkdir()  # in the stamp's way, also for root
    hashed.clear()
    for _ in range(2):
        cache.built("kind", "key", refuse)
    assert hashed == ["file", "file"]


def test_a_failed_build_leaves_its_sealed_parts_alone(kind):
    def fail(directory):
        cache.part(directory, "part", write)
        (directory / "loose").write_text("half")
        (directory / "half").mkdir()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.built("kind", "key", fail)
    assert [path.name for path in unfinished(kind).iterdir()] == ["part"]

    def go_on(directory):
        shutil.copy(cache.part(directory, "part", refuse) / "file", directory / "copy")

    entry = cache.built("kind", "key", go_on)
    assert sorted(path.name for path in entry.iterdir()) == ["copy", cache.SEAL]
    assert list(kind.iterdir()) == [entry]


def test_a_failed_build_without_parts_leaves_nothing(kind):
    with pytest.raises(ZeroDivisionError):
        cache.built("kind", "key", lambda directory: write(directory) or 1 / 0)
    assert list(kind.iterdir()) == []


def test_a_damaged_part_is_made_again(kind):
    unfinished(kind).mkdir()
    flip(cache.part(unfinished(kind), "part", write) / "file")
    assert (cache.part(unfinished(kind), "part", write) / "file").read_bytes() == b"content"


def test_a_build_that_was_killed_after_its_seal_only_needs_its_name(kind):
    directory = unfinished(kind)
    directory.mkdir()
    cache.part(directory, "part", write)
    write(directory)
    cache._seal(directory)
    entry = cache.built("kind", "key", refuse)
    assert sorted(path.name for path in entry.iterdir()) == [cache.SEAL, "file"]


def test_what_a_killed_build_left_goes_after_a_week_unless_a_process_holds_it(kind):
    old, held, young = (unfinished(kind, name) for name in ("old", "held", "young"))
    for path in (old, held, young):
        path.mkdir()
        write(path)
    for path in (old, held):
        os.utime(path, (0, 0))
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    cache.built("kind", "key", write)
    os.close(descriptor)
    assert sorted(kind.iterdir()) == sorted([held, kind / "key", young])


def test_where_the_file_system_has_no_locks_each_build_has_its_own_directory(kind, monkeypatch):
    def refused(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    seen = []

    def build_within_a_build(directory):
        seen.append(directory)
        if len(seen) == 1:
            cache.built("kind", "key", build_within_a_build)
        write(directory)

    entry = cache.built("kind", "key", build_within_a_build)
    assert len(set(seen)) == 2 and (entry / "file").read_bytes() == b"content"
    assert not any(path.exists() for path in seen)


def test_an_entry_made_of_all_files_of_another_is_sound(kind):
    first = cache.built("kind", "first", write)
    second = cache.built("kind", "second", lambda target: shutil.copytree(first, target, dirs_exist_ok=True))
    assert cache.built("kind", "second", refuse) == second
