import errno
import hashlib
import os
from pathlib import Path

import pytest

from finetune.errors import BaseError
from finetune.store.downloads import refusal_of_disk, refuse_damaged

CONTENT = b"weights" * 100_000
NAMES = {
    "sha256 of a large file": hashlib.sha256(CONTENT).hexdigest(),
    "git's sha1": hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest(),
    "sha1, of a proxy": hashlib.sha1(CONTENT).hexdigest(),
}


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    for name in ("blobs", "snapshot", "elsewhere"):
        (tmp_path / name).mkdir()
    return tmp_path / "snapshot"


def link(snapshot: Path, name: str, content: bytes) -> Path:
    """A file of the Hub's cache as it lies there: a link to a blob, which has the name."""
    blob = snapshot.with_name("blobs") / name
    blob.write_bytes(content)
    file = snapshot / "model.safetensors"
    file.symlink_to(f"../blobs/{name}")
    return file


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_file_with_the_hash_that_is_its_name_is_taken_and_another_refused(name, snapshot) -> None:
    file = link(snapshot, name, CONTENT)
    refuse_damaged([file], BaseError, "a/b@c0ffee")
    file.resolve().write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(BaseError, match="a/b@c0ffee: a file is not what the Hub has") as caught:
        refuse_damaged([file], BaseError, "a/b@c0ffee", "/made/of/it")
    assert caught.value.hint == f"remove {file.resolve()} and /made/of/it, so that it is downloaded again"


def test_a_blob_that_lies_elsewhere_under_another_hash_goes_by_the_name_in_its_repository(snapshot) -> None:
    file = link(snapshot, hashlib.sha256(CONTENT).hexdigest(), CONTENT)
    shared = snapshot.with_name("elsewhere") / (64 * "e")
    file.resolve().rename(shared)
    (snapshot / file.readlink()).symlink_to(shared)
    refuse_damaged([file], BaseError, "a/b@c0ffee")


def test_what_says_nothing_of_its_hash_is_taken(snapshot) -> None:
    named_otherwise = link(snapshot, "0a1b-5", CONTENT)
    plain = snapshot / "config.json"
    plain.write_bytes(b"{}")
    removed = snapshot / "tokenizer.json"
    removed.symlink_to(f"../blobs/{64 * 'a'}")
    refuse_damaged([named_otherwise, plain, removed], BaseError, "a/b@c0ffee")


def test_a_file_is_read_once_a_boot_as_long_as_nobody_writes_to_it(snapshot, monkeypatch, tmp_path) -> None:
    file = link(snapshot, hashlib.sha256(CONTENT).hexdigest(), CONTENT)
    boot = tmp_path / "boot_id"
    boot.write_text("first")
    monkeypatch.setattr("finetune.store.boot.BOOT_ID", boot)
    read = []
    monkeypatch.setattr("finetune.store.downloads._is_sound", lambda blob: read.append(blob) or True)
    for _ in range(2):
        refuse_damaged([file], BaseError, "a/b@c0ffee")
    assert len(read) == 1
    os.utime(file)
    refuse_damaged([file], BaseError, "a/b@c0ffee")
    boot.write_text("second")
    refuse_damaged([file], BaseError, "a/b@c0ffee")
    assert len(read) == 3


def test_a_disk_is_recognised_beneath_what_a_client_made_of_it() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = ValueError("no luck")
    wrapped.__cause__ = full
    of_xet = RuntimeError("Task error: IO Error: Permission denied (os error 13)")
    firewall = ConnectionError("no way")
    firewall.__cause__ = PermissionError(errno.EPERM, "Operation not permitted")
    told = [refusal_of_disk(error, BaseError, "HF_HOME=/x") for error in (full, wrapped, of_xet, firewall)]
    assert [str(one).partition("\n")[0] if one else None for one in told] == [
        "HF_HOME=/x: downloads cannot be kept: no space left on device",
        "HF_HOME=/x: downloads cannot be kept: no space left on device",
        "HF_HOME=/x: downloads cannot be kept: permission denied",
        None,
    ]
