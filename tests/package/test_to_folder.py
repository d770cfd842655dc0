"""A folder as a target: the old package or the new one at every moment, and never somebody's files."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from finetune.errors import PublishError
from finetune.package import provenance, to_folder
from finetune.package.card import NOTES_BEGIN, NOTES_END
from finetune.package.contents import files_of

CARD = f"# A model\n\n{NOTES_BEGIN}\n{NOTES_END}\n"


def package(directory: Path, weights: str) -> dict[str, Path]:
    """What has the files of a package, whatever they say."""
    (directory / "training").mkdir(parents=True)
    (directory / "model.safetensors").write_text(weights)
    (directory / "README.md").write_text(CARD)
    (directory / "training/recipe.yaml").write_text("{}\n")
    subjects = [
        {"name": name, "digest": {"sha256": provenance.sha256(path)}}
        for name, path in files_of(directory).items()
        if name != "README.md"
    ]
    said = {"_type": provenance.STATEMENT, "predicateType": provenance.PREDICATE, "subject": subjects}
    (directory / provenance.FILE).write_text(json.dumps(said))
    return files_of(directory)


def content(directory: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_of(directory).items()}


@pytest.fixture
def old(tmp_path) -> dict[str, Path]:
    return package(tmp_path / "old", "old weights")


@pytest.fixture
def new(tmp_path) -> dict[str, Path]:
    return package(tmp_path / "new", "new weights, and more")


@pytest.fixture
def target(tmp_path, old) -> Path:
    to_folder.publish(old, tmp_path / "out/model", is_dry_run=False)
    return tmp_path / "out/model"


def test_a_new_package_takes_the_place_of_an_earlier_one(tmp_path, target, new) -> None:
    assert to_folder.publish(new, target, is_dry_run=True)["commits"] == 1
    assert content(target) == content(tmp_path / "old")
    assert to_folder.publish(new, target, is_dry_run=False)["commits"] == 1
    assert content(target) == content(tmp_path / "new")
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert to_folder.publish(new, target, is_dry_run=False)["commits"] == 0


def test_what_people_wrote_into_the_card_stays(target, new) -> None:
    (target / "README.md").write_text(CARD.replace(NOTES_END, f"Mind the gap.\n{NOTES_END}"))
    to_folder.publish(new, target, is_dry_run=False)
    assert "Mind the gap.\n" in (target / "README.md").read_text()


@pytest.mark.parametrize("name", ["thesis.tex", "training/notes.txt"])
def test_a_folder_with_a_file_of_somebody_is_left_as_it_is(target, new, name) -> None:
    (target / name).write_text("years of work")
    before = content(target)
    with pytest.raises(PublishError, match="has something else"):
        to_folder.publish(new, target, is_dry_run=False)
    assert content(target) == before and len(list(target.parent.iterdir())) == 1


def test_a_file_or_a_folder_that_is_no_package_is_left_as_it_is(tmp_path, new) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(PublishError, match="has something else"):
            to_folder.publish(new, tmp_path / name, is_dry_run=False)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/mine.txt").read_text() == "mine"


def died(work: Callable[[], object], event: int) -> bool:
    """Does the work in a process that is killed at its so many-th event (opening, renaming, removing, …); whether it came that far."""
    child = os.fork()
    if not child:
        seen = count()

        def hook(name: str, arguments: tuple) -> None:
            if name.startswith(("open", "os.", "shutil.", "ctypes.", "fcntl.")) and next(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_anywhere_the_folder_is_old_or_new_and_a_second_call_finishes(tmp_path, target, old, new) -> None:
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    for event in count():
        is_dead = died(lambda: to_folder.publish(new, target, is_dry_run=False), event)
        assert content(target) in (before, after), f"event {event}: neither old nor new"
        to_folder.publish(new, target, is_dry_run=False)
        assert content(target) == after and [path.name for path in target.parent.iterdir()] == ["model"]
        to_folder.publish(old, target, is_dry_run=False)
        if not is_dead:
            break
    assert event > 40


def test_the_staged_folder_of_a_living_process_is_not_removed(tmp_path, target, new) -> None:
    program = "import fcntl, os, sys; held = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(held, fcntl.LOCK_EX); print(flush=True); input()"
    staging = target.parent / ".model.0123abcd"
    staging.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, staging], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        to_folder.publish(new, target, is_dry_run=False)
        assert staging.is_dir()
        other.communicate(b"\n")
    package(tmp_path / "third", "third weights")
    to_folder.publish(files_of(tmp_path / "third"), target, is_dry_run=False)
    assert not staging.exists()


def test_a_file_system_that_cannot_exchange_keeps_the_old_package(tmp_path, target, new, monkeypatch) -> None:
    class NoExchange:
        def renameat2(self, *arguments: object) -> int:
            to_folder.ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(to_folder.ctypes, "CDLL", lambda *arguments, **options: NoExchange())
    with pytest.raises(PublishError, match="cannot exchange two folders"):
        to_folder.publish(new, target, is_dry_run=False)
    assert content(target) == content(tmp_path / "old") and len(list(target.parent.iterdir())) == 1


def test_a_full_disk_keeps_the_old_package_and_is_one_error(tmp_path, old) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        to_folder.publish(old, disk / "model", is_dry_run=False)
        large = package(tmp_path / "large", "w" * 500_000)
        with pytest.raises(PublishError) as caught:
            to_folder.publish(large, disk / "model", is_dry_run=False)
        assert caught.value.message == "cannot write: no space left on device" and caught.value.hint
        assert content(disk / "model") == content(tmp_path / "old") and len(list(disk.iterdir())) == 1
    finally:
        subprocess.run(["umount", disk], check=True)
    shutil.rmtree(disk)
