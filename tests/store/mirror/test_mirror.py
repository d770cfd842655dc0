"""A run in a folder as its mirror: what is sent, what is kept, what comes back."""

import contextlib
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.errors import MirrorError, RunError
from finetune.recipe.schema import KeepWhole, Mirror
from finetune.store.checkpoints.manifest import MANIFEST, Manifest
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.durable import replace_file
from finetune.store.mirror import commit, following, owner, pieces, pulled
from finetune.store.mirror.bucket import Folder
from finetune.store.mirror.opening import opened
from finetune.store.mirror.owner import TakenOverError, UnusableError
from finetune.store.mirror.sender import Sender
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory

PLANNED = Path(__file__).parents[2] / "fixtures/run_before_rooms/runs/older"
PIECE = 4096


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(pieces.Sending.file, "__defaults__", (PIECE, None))
    monkeypatch.setattr(owner, "GRACE_SECONDS", 0.0)


class Made:
    """A run whose commits this writes: a few kilobytes each, of which a part never changes."""

    def __init__(self, path: Path):
        path.mkdir(parents=True)
        self.path = path
        self.paths = RunDirectory(path)
        plan, facts = RunDirectory(PLANNED).plan()
        self.plan, self.id = plan, facts["run"]
        self.paths.plan_file.write_bytes(plan.dump(facts))
        self.paths.recipe.write_text("made: here\n")
        self.store = Store(path)

    def commit(self, step: int, seed: int = 0, **fields: object) -> Path:
        with self.paths.journal.open("ab") as file:
            for at in range(1 if step < 10 else step - 9, step + 1):
                file.write(b'{"kind": "step", "step": %d, "loss": 1.0, "seconds": 1, "attempt": "a"}\n' % at)
        self.paths.rows.mkdir(exist_ok=True)
        (self.paths.rows / f"step-{step:08d}-{step:08d}.parquet").write_bytes(b"rows of %d" % step)
        attempt = self.store.begin(step, "a")
        attempt.write_bytes("frozen.bin", b"frozen" * 2000)
        attempt.write_bytes("model.bin", bytes((step + seed + at // 100) % 256 for at in range(10_000)))
        manifest = Manifest(run=self.id, attempt="a", step=step, parent=None, plan_id=self.plan.plan_id, **fields)
        return self.store.commit(attempt, manifest).path


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "runs" / "a")


@pytest.fixture
def bucket(tmp_path: Path) -> Folder:
    return Folder(f"file://{tmp_path}/bucket/a")


def rules(**keep: object) -> Mirror:
    return Mirror(to="file:///unused", keep=KeepWhole(**keep))


def sender(run: Path, bucket: Folder, mirror: Mirror | None = None) -> Sender:
    plan, facts = RunDirectory(run).plan()
    writer = owner.Writer(bucket, facts["run"], run, "now")
    writer.take(print)
    return Sender(run, mirror or rules(), writer, print, lambda: None)


def names(bucket: Folder, folder: str) -> list[str]:
    return sorted(bucket.sizes(folder))


def test_a_restored_run_has_the_bytes_of_its_newest_commit(made, bucket, tmp_path) -> None:
    made.commit(4)
    made.commit(8)
    assert sender(made.path, bucket).round(is_last=False) == [8, 4]
    said: list[str] = []
    assert pulled.restore(bucket, tmp_path / "b", said.append) == 8
    assert said == []
    left, right = (
        {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}
        for run in (made.path, tmp_path / "b")
    )
    assert left.keys() - right.keys() == {p for p in left if "step-00000004/" in p}
    assert right.items() <= left.items()
    assert verify(RunDirectory(tmp_path / "b").checkpoint(8)) == []
    journal.Journal(tmp_path / "b").close()  # it can be appended to


def test_what_does_not_change_is_sent_once(made, bucket) -> None:
    made.commit(4)
    first = sender(made.path, bucket)
    first.round(is_last=False)
    before = bucket.sizes("blobs")
    made.commit(8)
    first.round(is_last=False)
    added = bucket.sizes("blobs").keys() - before.keys()
    frozen = -(-12_000 // PIECE)
    assert len(added) < len(before)
    assert sum(bucket.sizes("blobs")[name] for name in added) < 12_000 + frozen


def test_the_rules_of_the_mirror_are_its_own(made, bucket) -> None:
    mirror = sender(made.path, bucket, rules(last=1, every="8 steps"))
    for step in range(2, 13, 2):
        made.commit(step)
        mirror.round(is_last=False)
        if step > 4:
            made.store.remove(made.store.find(step - 2))
    assert mirror.steps == [8, 12]
    assert [name[-27:-14] for name in names(bucket, "commits")] == ["step-00000008", "step-00000012"]
    named = {piece for record in mirror._records.values() for piece in record.pieces}
    assert {Path(name).stem for name in names(bucket, "blobs")} == named


def test_commits_between_the_cadence_wait_for_the_end(made, bucket) -> None:
    mirror = sender(made.path, bucket, Mirror(to="file:///unused", every="4 steps"))
    made.commit(4)
    made.commit(6)
    assert mirror.round(is_last=False) == [4]
    assert mirror.round(is_last=True) == [6]


def test_a_step_that_is_committed_again_replaces_the_one_before(made, bucket, tmp_path) -> None:
    mirror = sender(made.path, bucket)
    made.commit(4)
    mirror.round(is_last=False)
    made.store.remove(made.store.find(4))
    again = made.commit(4, seed=1)
    assert mirror.round(is_last=False) == [4]
    assert len(names(bucket, "commits")) == 1
    assert pulled.restore(bucket, tmp_path / "b", print) == 4
    assert (RunDirectory(tmp_path / "b").checkpoint(4) / "model.bin").read_bytes() == (again / "model.bin").read_bytes()


def test_what_a_rollback_gave_up_is_removed(made, bucket) -> None:
    mirror = sender(made.path, bucket)
    made.commit(4)
    made.commit(8)
    mirror.round(is_last=False)
    with made.paths.journal.open("ab") as file:
        amended = journal.event("amended", "a", step=8, action="rollback", first=7, last=8, to=4)
        file.write(f"{json.dumps(amended | {'time': '2999-01-01T00:00:00.000+00:00'})}\n".encode())
    made.store.remove(made.store.find(8))
    made.commit(6)
    assert mirror.round(is_last=False) == [6]
    assert mirror.steps == [4, 6]


def test_a_flipped_byte_is_named_and_the_commit_before_is_taken(made, bucket, tmp_path) -> None:
    mirror = sender(made.path, bucket)
    made.commit(4)
    made.commit(8)
    mirror.round(is_last=False)
    record = mirror._records[8]
    piece = record.files["checkpoints/step-00000008/model.bin"].pieces[1]
    path = tmp_path / f"bucket/a/blobs/{piece[:2]}/{piece}.bin"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    assert pulled.restore(bucket, tmp_path / "b", said.append) == 4
    assert said == [
        f"damaged: the object blobs/{piece[:2]}/{piece}.bin is damaged: it has other bytes than its name says; "
        "step 8 of the mirror is passed over"
    ]
    assert RunDirectory(tmp_path / "b").stored_steps() == [4]
    # The object is gone, so the same bytes are sent again.
    Made.commit(made, 12)
    sender(made.path, bucket).round(is_last=False)
    assert not path.exists()


def test_a_mirror_without_a_whole_commit_is_an_error_and_an_empty_one_is_none(made, bucket, tmp_path) -> None:
    assert pulled.restore(bucket, tmp_path / "b", print) is None
    made.commit(4)
    sender(made.path, bucket).round(is_last=False)
    for name in names(bucket, "blobs"):
        bucket.remove([name])
    with pytest.raises(MirrorError, match="has no commit that is whole"):
        pulled.restore(bucket, tmp_path / "b", print)
    assert not RunDirectory(tmp_path / "b").is_run


def test_another_run_is_refused(made, bucket, tmp_path) -> None:
    sender(made.path, bucket)
    with pytest.raises(UnusableError, match="is the mirror of another run, a "):
        owner.Writer(bucket, "another", tmp_path / "b", "now").take(print)


def test_of_two_hosts_the_later_one_writes(made, bucket, tmp_path) -> None:
    made.commit(4)
    first = sender(made.path, bucket)
    first.round(is_last=False)
    other = Path(shutil.copytree(made.path, tmp_path / "elsewhere" / "a"))
    second = sender(other, bucket)
    made.commit(8)
    with pytest.raises(TakenOverError, match="was taken over by"):
        first.round(is_last=False)
    assert second.round(is_last=False) == []
    assert second.steps == [4]


def test_who_takes_over_from_another_place_waits_until_that_one_has_noticed(
    made, bucket, tmp_path, monkeypatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(owner.time, "sleep", waited.append)
    first = sender(made.path, bucket)
    sender(made.path, bucket)  # of the same directory, whose lock it has
    assert waited == []
    other = Path(shutil.copytree(made.path, tmp_path / "elsewhere" / "a"))
    second = sender(other, bucket)
    assert waited == [0.0]
    second._writer.release()
    sender(made.path, bucket)
    assert waited == [0.0]
    with pytest.raises(TakenOverError):
        first._writer.check()


def test_a_commit_that_is_damaged_here_is_said_and_not_sent(made, bucket, capsys) -> None:
    made.commit(4)
    path = made.commit(8) / "model.bin"
    path.chmod(0o644)
    path.write_bytes(b"x" * 10_000)
    mirror = sender(made.path, bucket)
    assert mirror.round(is_last=False) == [4]
    assert (
        "step 8 is damaged here: model.bin has other bytes than were committed; it is not mirrored"
        in capsys.readouterr().out
    )
    assert mirror.lacks() == [8]


def test_a_commit_that_is_removed_or_demoted_while_it_is_sent_is_no_damage(made, bucket, monkeypatch, capsys) -> None:
    made.commit(4)
    made.commit(8)
    begin, left = commit.read, [8, 4]

    def read(path: Path):
        checkpoint = begin(path)
        if left and checkpoint.step == left[0]:
            left.pop(0)
            made.store.remove(checkpoint) if checkpoint.step == 8 else demote(checkpoint)
        return checkpoint

    def demote(checkpoint) -> None:
        files = {"model.bin": checkpoint.manifest.files["model.bin"]}
        replace_file(checkpoint.path / MANIFEST, replace(checkpoint.manifest, kind="weights", files=files).to_bytes())
        (checkpoint.path / "frozen.bin").unlink()

    monkeypatch.setattr(commit, "read", read)
    assert sender(made.path, bucket, rules(last=9, every="4 steps")).round(is_last=False) == [4]
    assert "damaged" not in capsys.readouterr().out
    (record,) = pulled.records(bucket, None, print)
    assert (record.step, record.kind) == (4, "weights")


def test_a_record_may_not_lead_out_of_the_run(made, bucket, tmp_path) -> None:
    mirror = sender(made.path, bucket)
    made.commit(4)
    mirror.round(is_last=False)
    good = mirror._records[4]
    some = next(iter(good.files.values()))
    for name in ("../evil", "/etc/evil", "rows/../../evil", "", "rows//a", ".hidden"):
        bad = replace(good, number=9, files={**good.files, name: some})
        bucket.put(bad.object_name, bad.to_bytes())
        said: list[str] = []
        assert pulled.restore(bucket, tmp_path / "b", said.append) == 4
        assert said and "it names a file" in said[0]
        shutil.rmtree(tmp_path / "b")
    assert not (tmp_path / "evil").exists()


def test_the_command_sends_what_is_missing(made, tmp_path) -> None:
    made.commit(4)
    facts = following.send(made.path, f"file://{tmp_path}/other/{{run}}")
    assert facts == {"mirror": f"file://{tmp_path}/other/a", "sent": [4], "steps": [4], "missing": []}
    assert following.send(made.path, facts["mirror"])["sent"] == []


def test_two_checkpoints_come_back_where_two_are_asked_for(made, bucket, tmp_path) -> None:
    made.commit(4)
    made.commit(8)
    made.commit(12)
    sender(made.path, bucket, rules(last=3)).round(is_last=False)
    assert pulled.restore(bucket, tmp_path / "b", print, 2) == 12
    assert RunDirectory(tmp_path / "b").stored_steps() == [8, 12]


def test_a_really_full_disk_leaves_no_run_and_the_same_call_goes_on(made, bucket, tmp_path) -> None:
    made.commit(4)
    sender(made.path, bucket).round(is_last=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(RunError, match="cannot write: no space left on device\nhint: free some space"):
            pulled.restore(bucket, disk / "a", print)
        assert not RunDirectory(disk / "a").is_run
        kept = [path.name for path in (disk / "a/attempts").rglob("*") if path.is_file()]
        assert kept
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", disk], check=True)
        assert pulled.restore(bucket, disk / "a", print) == 4
        assert verify(RunDirectory(disk / "a").checkpoint(4)) == []
    finally:
        subprocess.run(["umount", disk], check=True)


class CutError(BaseException):
    """Stands for SIGKILL."""


class Cut(Folder):
    """A folder whose writer is killed after so many bytes: what it was writing is lost, or there in part."""

    def __init__(self, place: str, after: int):
        super().__init__(place)
        self.left = after

    def put(self, name: str, content: bytes) -> None:
        self.left -= len(content)
        if self.left < 0:
            beside = self._root / f"{name}.tmp"
            beside.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            beside.write_bytes(content[: self.left])
            raise CutError
        super().put(name, content)

    def remove(self, names) -> None:
        for name in names:
            self.left -= 500
            if self.left < 0:
                raise CutError
            super().remove([name])


def cut_anywhere(made: Made, tmp_path: Path, cuts: int, seed: int) -> int:
    """Sends commits, killed at random bytes; after each kill what the mirror gives is whole, and no older than what it had."""
    draw, had, step = random.Random(seed), 0, 0
    place = f"file://{tmp_path}/bucket/a"
    for number in range(cuts):
        if number % 2 == 0:
            step += 4
            made.commit(step)
            if step > 8:
                made.store.remove(made.store.find(step - 8))
        with contextlib.suppress(CutError):
            cut = sender(made.path, Cut(place, draw.randrange(40_000 + made.paths.journal.stat().st_size)))
            cut.round(is_last=False)
        back = tmp_path / "back"
        restored = pulled.restore(Folder(place), back, print)
        if had or restored is not None:
            assert restored is not None and restored >= had
            checkpoint = RunDirectory(back).checkpoint(restored)
            assert verify(checkpoint) == []
            assert (checkpoint / "model.bin").read_bytes() == bytes(
                (restored + at // 100) % 256 for at in range(10_000)
            )
            had = restored
            shutil.rmtree(back)
    return had


def test_a_cut_at_any_byte_of_the_upload_leaves_a_whole_commit(made, tmp_path) -> None:
    assert cut_anywhere(made, tmp_path, 12, seed=0) > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_cuts_at_random_bytes_of_the_upload(seed, made, tmp_path, capsys) -> None:
    assert cut_anywhere(made, tmp_path, 20, seed) >= 20
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 1, 100, -1, -70])
def test_a_torn_record_is_passed_over(size, made, bucket, tmp_path, capsys) -> None:
    mirror = sender(made.path, bucket)
    made.commit(4)
    made.commit(8)
    mirror.round(is_last=False)
    name = mirror._records[8].object_name
    whole = bucket.read(name)
    bucket.put(name, whole[:size])
    said: list[str] = []
    assert pulled.restore(bucket, tmp_path / "b", said.append) == 4
    assert said == [f"damaged: the record is torn or damaged: {name}"]
    # The next writer sends the commit again, and removes the torn record.
    again = sender(made.path, bucket)
    assert again.round(is_last=False) == [8]
    assert name not in names(bucket, "commits")
    assert again.steps == [4, 8]


def test_a_record_of_a_newer_version_is_no_damage(made, bucket, tmp_path) -> None:
    mirror = sender(made.path, bucket)
    made.commit(4)
    mirror.round(is_last=False)
    newer = replace(mirror._records[4], schema=2, number=5)
    bucket.put(newer.object_name, newer.to_bytes())
    with pytest.raises(MirrorError, match="was written by a newer version of finetune"):
        pulled.restore(bucket, tmp_path / "b", print)


class Interrupted(Folder):
    """A folder in which something else happens right before the call of this number."""

    def __init__(self, place: str, at: int, then):
        super().__init__(place)
        self.calls, self._at, self._then = 0, at, then

    def put(self, name: str, content: bytes) -> None:
        self._count()
        super().put(name, content)

    def remove(self, names) -> None:
        self._count()
        super().remove(names)

    def sizes(self, folder: str) -> dict[str, int]:
        self._count()
        return super().sizes(folder)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._at:
            self._then()


def test_every_commit_is_whole_wherever_a_second_writer_comes(made, bucket, tmp_path) -> None:
    for step in (4, 8, 12):
        made.commit(step)
    sender(made.path, bucket, rules(last=3)).round(is_last=False)
    before = shutil.copytree(tmp_path / "bucket", tmp_path / "before")
    made.commit(16)
    other = Made(tmp_path / "elsewhere" / "a")
    for step in (12, 20):
        other.commit(step, seed=step)
    at, calls, stopped = 1, 2, 0  # the first call is the first one's own claim
    while at < calls:
        at += 1
        shutil.rmtree(tmp_path / "bucket")
        shutil.copytree(before, tmp_path / "bucket")
        second = owner.Writer(bucket, made.id, other.path, "now")
        # It claims the mirror at this moment, and begins when the first one has had the time for its next look.
        first = Interrupted(bucket.place, at, second.claim)
        try:
            sender(made.path, first).round(is_last=False)
        except TakenOverError:
            stopped += 1
        calls = max(calls, first.calls)
        Sender(other.path, rules(), second, print, lambda: None).round(is_last=False)
        sizes = bucket.sizes("blobs")
        found = list(pulled.records(bucket, made.id, print))
        assert found[0].step == 20
        assert {f"blobs/{piece[:2]}/{piece}.bin" for record in found for piece in record.pieces} == sizes.keys()
    assert calls > 10 and stopped > 5


@pytest.mark.parametrize("place", ["s3://key:word@bucket/a", "s3://bucket/a?token=word", "runs/word", "https://word"])
def test_an_address_with_credentials_or_of_something_else_is_refused_and_not_repeated(place, made) -> None:
    for ask in (lambda: following.send(made.path, place), lambda: opened(place)):
        with pytest.raises(MirrorError, match="the address of a mirror must ") as caught:
            ask()
        assert "word" not in str(caught.value)
