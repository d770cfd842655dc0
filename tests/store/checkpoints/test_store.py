"""A kill, an error or a flipped bit at any place of a save leaves a sound checkpoint, and damage is named."""

import errno
import os
import random
import shutil
import stat
import subprocess
from dataclasses import replace

import pytest

from finetune.errors import CheckpointError
from finetune.recipe.schema import Keep
from finetune.store import durable as durable_module
from finetune.store.checkpoints import pruning
from finetune.store.checkpoints import store as store_module
from finetune.store.checkpoints.manifest import Manifest, read
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import Damage, verify
from finetune.store.tensors import Tensor, read_header


def manifest_of(step, **fields):
    return Manifest(run="r", attempt="a1", step=step, parent=None, plan_id="p", **fields)


def fill(attempt, size=3000):
    content = random.Random(attempt.step).randbytes(size)
    tensors = [Tensor(f"layer.{n}", "F32", (size // 4,), content) for n in range(3)] + [
        Tensor("scale", "BF16", (3,), b"abcdef")
    ]
    attempt.write_tensors("model.safetensors", tensors, {"format": "pt"})
    attempt.write_json("state.json", {"step": attempt.step})
    attempt.write_bytes("tokenizer.json", b"{}" * 40)


def commit(store, step, size=3000):
    attempt = store.begin(step, "a1")
    fill(attempt, size)
    return store.commit(attempt, manifest_of(step))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs" / "a")


def test_a_commit_is_found_sound_and_read_only(store):
    committed = commit(store, 100)
    assert committed.path == store.run / "checkpoints" / "step-00000100"
    assert committed.manifest.files.keys() == {"model.safetensors", "state.json", "tokenizer.json"}
    assert [record.name for record in committed.manifest.files["model.safetensors"].tensors][-1] == "scale"
    assert verify(committed.path) == []
    assert store.checkpoints() == [committed] and store.unreadable() == [] and store.newest_sound() == (committed, [])
    assert os.listdir(store.run / "attempts") == []
    assert {stat.S_IMODE(path.stat().st_mode) for path in committed.path.iterdir()} == {0o444}


def test_a_reader_creates_nothing(store):
    assert store.checkpoints() == [] and store.newest_sound() == (None, [])
    store.sweep()
    assert not store.run.exists()


def test_a_step_that_is_not_there_is_answered_with_those_that_are(store):
    commit(store, 100), commit(store, 200)
    with pytest.raises(
        CheckpointError, match="has no step 150; committed: 100, 200\nhint: name one of these steps, `last` or `best`"
    ):
        store.find(150)


def test_a_committed_checkpoint_does_not_change(store):
    committed = commit(store, 100)
    with pytest.raises(CheckpointError, match="step-00000100: this step is committed already\nhint: "):
        commit(store, 100)
    assert verify(committed.path) == []


def test_a_damaged_checkpoint_makes_room_for_the_same_step(store):
    (commit(store, 100).path / "state.json").unlink()
    assert store.newest_sound()[0] is None
    assert verify(commit(store, 100).path) == []
    assert os.listdir(store.run / "trash") == []


def test_a_rename_that_could_not_be_synced_is_taken_back(store, monkeypatch):
    first = commit(store, 100)
    real_sync = durable_module.sync_directory

    def sync(path):
        if path == store.directory:
            raise OSError(errno.EIO, "Input/output error")
        real_sync(path)

    monkeypatch.setattr(durable_module, "sync_directory", sync)
    with pytest.raises(
        CheckpointError, match="step-00000200: cannot write: input/output error\nhint: the disk reports errors"
    ):
        commit(store, 200)
    assert store.checkpoints() == [first] and os.listdir(store.run / "attempts") == []


def test_a_manifest_of_another_step_is_a_bug(store):
    with pytest.raises(ValueError, match="a manifest of step 7 for an attempt at step 8"):
        store.commit(store.begin(8, "a1"), manifest_of(7))


@pytest.mark.parametrize("name", ["../x", "a/b", "manifest.json", ".."])
def test_an_attempt_writes_only_into_its_directory(store, name):
    with pytest.raises(CheckpointError, match="cannot be the name"):
        store.begin(1, "a1").write_bytes(name, b"")


def test_a_removed_checkpoint_is_gone_and_a_sweep_empties_attempts_and_trash(store):
    store.remove(commit(store, 100))
    assert store.checkpoints() == [] and os.listdir(store.run / "trash") == []
    fill(store.begin(200, "a1"))
    shutil.copytree(store.run / "attempts", store.run / "trash", dirs_exist_ok=True)
    store.sweep()
    assert os.listdir(store.run / "attempts") == os.listdir(store.run / "trash") == []


def test_other_names_beside_the_checkpoints_are_ignored(store):
    committed = commit(store, 100)
    for name in ("step-100", "step-00000200.tmp", "best", "checkpoint-5"):
        shutil.copytree(committed.path, store.directory / name)
    assert [item.step for item in store.checkpoints()] == [100]


def test_unreadable_checkpoints_are_told_apart(store):
    sound = commit(store, 100)
    contents = {200: None, 300: b"", 400: b'{"weights": 1}', 500: (sound.path / "manifest.json").read_bytes()}
    for step, content in contents.items():
        path = store.directory / f"step-{step:08d}"
        path.mkdir()
        if content is not None:
            (path / "manifest.json").write_bytes(content)
    future = commit(store, 600).path / "manifest.json"
    future.unlink()
    future.write_bytes(replace(manifest_of(600), schema=2).to_bytes())
    found = {item.step: (item.damage.check, item.damage.message) for item in store.unreadable()}
    assert found == {
        200: ("manifest", "cannot be read: no such file or directory"),
        300: ("manifest", "the manifest is torn or damaged"),
        400: ("foreign", "the manifest is not one of finetune's"),
        500: ("manifest", "is the manifest of step 100"),
        600: (
            "future",
            "the checkpoint has format 2 and was written by a newer version of finetune; this one reads up to 1",
        ),
    }
    newer = "written by a newer version of finetune; this one reads up to 1\nhint: update finetune"
    with pytest.raises(CheckpointError, match=newer):
        store.find(600)
    with pytest.raises(CheckpointError, match="committed already"):
        commit(store, 600)
    with pytest.raises(CheckpointError, match=newer):  # not a reason to train its steps again
        store.newest_sound()
    shutil.rmtree(future.parent)
    with pytest.raises(CheckpointError, match="not one of finetune's\nhint: move it out of the run"):
        store.newest_sound()
    shutil.rmtree(store.directory / "step-00000400")
    newest, damages = store.newest_sound()
    assert newest == sound
    assert [damage.file for damage in damages] == [f"step-{step:08d}/manifest.json" for step in (500, 300, 200)]


def test_an_identical_file_is_linked(store):
    first = commit(store, 100)
    attempt = store.begin(200, "a1")
    attempt.link("tokenizer.json", first.path / "tokenizer.json", first.manifest.files["tokenizer.json"])
    second = store.commit(attempt, manifest_of(200))
    assert (second.path / "tokenizer.json").samefile(first.path / "tokenizer.json")
    store.remove(first)
    assert verify(second.path) == []


@pytest.fixture
def without_links(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(store_module.os, "link", refuse)


def test_an_identical_file_is_copied_where_links_are_impossible(store, without_links):
    first = commit(store, 100)
    attempt = store.begin(200, "a1")
    attempt.link("model.safetensors", first.path / "model.safetensors", first.manifest.files["model.safetensors"])
    second = store.commit(attempt, manifest_of(200))
    assert not (second.path / "model.safetensors").samefile(first.path / "model.safetensors")
    assert second.manifest.files["model.safetensors"] == first.manifest.files["model.safetensors"]


def test_a_file_that_changed_is_not_copied_on(store, without_links):
    first = commit(store, 100)
    flip(first.path / "tokenizer.json", 3, 0)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the file changed since it was committed"):
        store.begin(200, "a1").link(
            "tokenizer.json", first.path / "tokenizer.json", first.manifest.files["tokenizer.json"]
        )
    assert os.listdir(store.run / "attempts") == []


# Damage.


def flip(path, byte, bit):
    rewrite(path, lambda content: content.__setitem__(byte, content[byte] ^ 1 << bit))


def rewrite(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.unlink()  # the file may be a hard link, and is read-only
    path.write_bytes(content)


def test_one_flipped_bit_names_its_tensor_only(store):
    checkpoint = commit(store, 100)
    path = checkpoint.path / "model.safetensors"
    flip(path, read_header(path)["layer.1"].start, 0)
    message = "tensor layer.1 has other bytes than were committed"
    assert verify(checkpoint.path) == [Damage("tensor", "model.safetensors", "layer.1", message)]


def test_a_flipped_bit_in_the_header_is_named_so(store):
    checkpoint = commit(store, 100)
    path = checkpoint.path / "model.safetensors"
    flip(path, path.read_bytes().index(b"scale"), 0)
    assert [(damage.check, damage.tensor) for damage in verify(checkpoint.path)] == [("header", None)]


def test_all_damaged_files_are_reported(store):
    path = commit(store, 100).path
    flip(path / "state.json", 0, 0)
    (path / "tokenizer.json").unlink()
    rewrite(path / "model.safetensors", lambda content: content.extend(b"x"))
    (path / "stray.txt").write_text("x")
    found = [(damage.check, damage.file) for damage in verify(path)]
    assert ("size", "model.safetensors") in found
    assert [item for item in found if item[1] != "model.safetensors"] == [
        ("digest", "state.json"),
        ("missing", "tokenizer.json"),
        ("extra", "stray.txt"),
    ]


def test_damage_falls_back_to_the_one_before_and_a_stray_file_does_not(store):
    older, newer = commit(store, 100), commit(store, 200)
    (newer.path / "stray.txt").write_text("x")
    assert store.newest_sound() == (newer, [])
    flip(newer.path / "state.json", 2, 1)
    newest, damages = store.newest_sound()
    assert newest == older
    assert [(damage.check, damage.file) for damage in damages] == [("digest", "step-00000200/state.json")]


def test_a_really_full_disk_keeps_the_checkpoint_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    try:
        store = Store(disk / "run")
        first = commit(store, 100)
        with pytest.raises(CheckpointError, match="cannot write: no space left on device\nhint: free some space"):
            commit(store, 200, size=400_000)
        assert os.listdir(store.run / "attempts") == []
        assert store.newest_sound() == (first, [])
        assert commit(store, 300).step == 300
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_umask_decides_who_may_read(store):
    old = os.umask(0o077)
    try:
        committed = commit(store, 100)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in committed.path.iterdir()} == {0o400}


def test_a_copy_of_a_checkpoint_is_one_wherever_it_is(store, tmp_path):
    copy = shutil.copytree(commit(store, 100).path, tmp_path / "copy")
    assert read(copy).step == 100
    assert verify(copy) == []


def test_the_keep_rules_read_a_manifest_once_however_many_are_kept(store, monkeypatch):
    seen = []
    monkeypatch.setattr("finetune.store.checkpoints.stored.read", lambda path: seen.append(path.name) or read(path))
    for step in range(1, 31):
        attempt = store.begin(step, "a1")
        store.commit(attempt, manifest_of(step))
        seen.clear()
        actions = pruning.due(store, Keep(last=2, every="1 step"), {}, ())
        assert actions == [] and seen == [f"step-{step:08d}"]
    store.demote(read(store.directory / "step-00000007"))
    (store.directory / "step-00000009" / "manifest.json").unlink()
    kinds = {item.step: item.kind for item in store.summaries()}
    assert kinds[7] == "weights" and 9 not in kinds and len(kinds) == 29
