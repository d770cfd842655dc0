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
from finetune.package.attest import provenance
from finetune.package.card.notes import NOTES_BEGIN, NOTES_END
from finetune.package.publish import to_folder
from finetune.package.verify.contents import files_of

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
def test_what_was_added_stays_and_is_no_change(tmp_path, target, new, name) -> None:
    (target / name).write_text("years of work")
    (target / name).chmod(0o755)
    assert to_folder.publish(new, target, is_dry_run=False)["commits"] == 1
    assert content(target) == content(tmp_path / "new") | {name: b"years of work"}
    assert (target / name).stat().st_mode & 0o777 == 0o755 and len(list(target.parent.iterdir())) == 1
    assert to_folder.publish(new, target, is_dry_run=False)["commits"] == 0


def test_all_that_was_changed_is_named_and_overwritten_where_that_is_asked_for(tmp_path, target, new) -> None:
    (target / "thesis.tex").write_text("years of work")
    (target / "training/recipe.yaml").write_text("{a: 1}\n")
    (target / "README.md").write_text("# Mine\n")
    before = content(target)
    with pytest.raises(PublishError) as caught:
        to_folder.publish(new, target, is_dry_run=False)
    assert caught.value.message == "would overwrite what people changed or added: README.md, training/recipe.yaml"
    assert "--replace" in caught.value.hint and content(target) == before
    facts = to_folder.publish(new, target, is_dry_run=False, is_replacing=True)
    assert facts["overwritten"] == ["README.md", "training/recipe.yaml"]
    assert content(target) == content(tmp_path / "new") | {"thesis.tex": b"years of work"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_what_was_removed_is_there_again(tmp_path, target, new) -> None:
    (target / "training/recipe.yaml").unlink()
    to_folder.publish(new, target, is_dry_run=False)
    assert content(target) == content(tmp_path / "new")


def test_text_below_the_card_stays(target, new) -> None:
    (target / "README.md").write_text(f"{CARD}\n## Below\n")
    to_folder.publish(new, target, is_dry_run=False)
    assert (target / "README.md").read_text() == f"{CARD}\n## Below\n"


def test_a_file_or_a_folder_that_is_no_package_is_left_as_it_is(tmp_path, new) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(PublishError, match="has something else"):
            to_folder.publish(new, tmp_path / name, is_dry_run=False)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/mine.txt").read_text() == "mine"


def restore(target: Path, directory: Path) -> None:
    """As it was before, without the syncs of a publish."""
    shutil.rmtree(target)
    shutil.copytree(directory, target)


def died(work: Callable[[], object], event: int) -> bool:
    """Does the work in a process that is killed at its so many-th change (a file made, a name moved or removed, a lock); whether it came
    that far. What only reads is left out: a kill there is one at the change that follows."""
    child = os.fork()
    if not child:
        seen = count()

        def hook(name: str, arguments: tuple) -> None:
            is_change = name.startswith(("os.mkdir", "os.re", "os.rmdir", "shutil.", "ctypes.", "fcntl."))
            is_change |= name == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            if is_change and next(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.slow
def test_killed_anywhere_the_folder_is_old_or_new_and_a_second_call_finishes(tmp_path, target, new) -> None:
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    for event in count():
        is_dead = died(lambda: to_folder.publish(new, target, is_dry_run=False), event)
        assert content(target) in (before, after), f"event {event}: neither old nor new"
        to_folder.publish(new, target, is_dry_run=False)
        assert content(target) == after and [path.name for path in target.parent.iterdir()] == ["model"]
        restore(target, tmp_path / "old")
        if not is_dead:
            break
    assert event > 20


SYSTEM_CALLS = ["mkdir", "fsync", "sendfile", "flock", "renameat2", "unlinkat", "rmdir"]
PUBLISH = "import sys; from tests.package.publish.test_to_folder import *; to_folder.publish(files_of(Path(sys.argv[1])), Path(sys.argv[2]), False)"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace kills at a system call")
@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_killed_at_any_system_call_the_folder_is_old_or_new(tmp_path, target, new, call) -> None:
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    work, killed = [sys.executable, "-c", PUBLISH, str(tmp_path / "new"), str(target)], 0
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    for number in count(1):
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}"]
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", tmp_path / "log", *inject, *work], env=env, capture_output=True
        )
        assert content(target) in (before, after), f"{call} {number}: neither old nor new"
        to_folder.publish(new, target, is_dry_run=False)
        assert content(target) == after and [path.name for path in target.parent.iterdir()] == ["model"]
        restore(target, tmp_path / "old")
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        killed += 1
    assert killed, "it came to none of these"


def test_a_link_that_is_named_stays_and_leads_to_the_new_package(tmp_path, target, new) -> None:
    link = target.parent / "current"
    link.symlink_to("model")
    to_folder.publish(new, link, is_dry_run=False)
    assert link.is_symlink() and content(target) == content(tmp_path / "new")
    assert sorted(path.name for path in target.parent.iterdir()) == ["current", "model"]


def test_a_package_without_a_card_takes_the_place_of_one_with_a_card(tmp_path, target, new) -> None:
    (tmp_path / "new/README.md").unlink()
    to_folder.publish(files_of(tmp_path / "new"), target, is_dry_run=False)
    assert content(target) == content(tmp_path / "new")


@pytest.mark.parametrize("leads_to", ["../elsewhere", "nowhere"])
def test_a_folder_with_a_link_of_somebody_is_left_as_it_is(tmp_path, target, new, leads_to) -> None:
    (target.parent / "elsewhere").mkdir()
    for place in (target, target.parent / "links"):
        place.mkdir(exist_ok=True)
        (place / "theirs").symlink_to(leads_to)
        with pytest.raises(PublishError, match="has something else"):
            to_folder.publish(new, place, is_dry_run=False)
        assert (place / "theirs").is_symlink()


def test_what_comes_into_the_folder_while_a_package_is_copied_is_not_lost(target, new) -> None:
    watched = [True]

    def write(name: str, arguments: tuple) -> None:  # an audit hook stays for good: it works once
        if watched and name == "shutil.copyfile" and str(target.parent) in str(arguments[1]):
            watched.clear()
            (target / "thesis.tex").write_text("years of work")

    sys.addaudithook(write)
    with pytest.raises(PublishError, match="was changed by somebody else meanwhile"):
        to_folder.publish(new, target, is_dry_run=False)
    assert (target / "thesis.tex").exists() and (target / "model.safetensors").read_text() == "old weights"
    assert len(list(target.parent.iterdir())) == 1


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


class NoExchange:
    def renameat2(self, *arguments: object) -> int:
        to_folder.ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("libc", [NoExchange(), object()], ids=["the file system", "a libc without it"])
def test_where_nothing_can_be_exchanged_the_old_package_stays(libc, tmp_path, target, new, monkeypatch) -> None:
    monkeypatch.setattr(to_folder.ctypes, "CDLL", lambda *arguments, **options: libc)
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
