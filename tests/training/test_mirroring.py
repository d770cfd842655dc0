"""A mirror beside a training: the training neither waits for it nor is harmed by it."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from finetune.errors import MirrorError, RecipeError
from finetune.recipe.load import load
from finetune.store.mirror import bucket, following, pulled
from finetune.store.run.directory import RunDirectory
from finetune.training import companions, mirroring
from finetune.training.mirroring import Mirroring
from finetune.training.run import train as train_run
from tests import forks

STEPS = {"steps": 4, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
COMMITS = {"every": "2 steps", "save_best": False}


@pytest.fixture
def mirrored(recipe_file, tmp_path):
    """A recipe with a mirror, and where that is."""

    def mirrored(name: str = "tiny", **mirror: object) -> Path:
        mirror = {"to": f"file://{tmp_path}/bucket/{{run}}", **mirror}
        return recipe_file(name, train=STEPS, checkpoint=COMMITS, evaluate={"every": None}, mirror=mirror)

    return mirrored


@pytest.fixture
def run(mirrored, tmp_path, monkeypatch) -> Path:
    """A run of four steps, commits 2 and 4, and a recipe with a mirror that has nothing of it yet."""
    with monkeypatch.context() as patch:
        patch.setattr(mirroring.Mirroring, "__init__", lambda self, run, say: None)
        patch.setattr(mirroring.Mirroring, "look", lambda self: None)
        patch.setattr(mirroring.Mirroring, "finish", lambda self: None)
        train_run(load(mirrored()), tmp_path / "runs/a", is_quiet=True)
    return tmp_path / "runs/a"


def steps_of(place: Path) -> list[int]:
    return sorted(record.step for record in pulled.records(bucket.Folder(f"file://{place}"), None, print))


def test_a_killed_process_is_followed_by_one_that_sends_the_rest(run, tmp_path) -> None:
    said: list[str] = []
    beside = Mirroring(run, said.append)
    os.kill(beside._process._process.pid, signal.SIGKILL)
    assert beside._process.has_ended_within(10)
    beside.look()
    assert said == ["mirror stopped: its process was ended by SIGKILL; training goes on, and nothing is lost here"]
    assert beside.finish() is None
    assert steps_of(tmp_path / "bucket/a") == [2, 4]


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import time; time.sleep(100)", "it did not end within 1 second"),
        ("import os; os.write(1, b'file:///x\\nno such bucket\\n'); os._exit(1)", "no such bucket"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process was ended by SIGSEGV"),
    ],
    ids=["hangs", "fails", "crashes"],
)
def test_what_a_client_does_is_said_and_ends_in_bounded_time(program, reason, run, tmp_path, monkeypatch) -> None:
    (tmp_path / "client.py").write_text(program)
    start = forks.Either.Popen

    class Other(forks.Either):
        @staticmethod
        def Popen(command: list, **options: object) -> object:
            return start([sys.executable, str(tmp_path / "client.py")], **options)

    monkeypatch.setattr(companions, "subprocess", Other)
    said: list[str] = []
    assert Mirroring(run, said.append).finish(1.0) == reason
    assert said[-1] == f"not all is mirrored ({reason}); `finetune mirror {run}` sends the rest"
    monkeypatch.undo()
    assert following.send(run, None)["sent"] == [4, 2]


def test_a_process_whose_training_is_gone_sends_the_rest_and_ends(run, tmp_path) -> None:
    process = forks.Popen(
        [sys.executable, "-m", "finetune.store.mirror", str(run)], stdin=forks.PIPE, stdout=forks.PIPE
    )
    process.stdout.close()  # nobody listens either
    process.stdin.close()
    assert process.wait(60) == 0
    assert steps_of(tmp_path / "bucket/a") == [2, 4]


def test_a_training_does_not_begin_with_the_mirror_of_another_run(run, mirrored, tmp_path) -> None:
    following.send(run, None)
    recipe = mirrored("other", to=f"file://{tmp_path}/bucket/a")
    train = {"train.seed=1": "was started with another recipe"}
    for override, message in train.items():
        with pytest.raises(Exception, match=message):
            train_run(load(recipe, [override]), tmp_path / "runs/b", is_quiet=True)
    # A run that is here already and names it is refused as well.
    with pytest.raises(MirrorError, match="is the mirror of another run, a "):
        branched = tmp_path / "runs/c"
        train_run(load(recipe, ["mirror=null", "train.seed=1"]), branched, is_quiet=True)
        train_run(load(recipe, ["train.seed=1"]), branched, is_quiet=True)


def test_a_disk_that_is_behind_the_mirror_is_not_trained_a_second_time(run, mirrored, tmp_path) -> None:
    following.send(run, None)
    journal = RunDirectory(run).journal
    journal.write_bytes(
        b"".join(line for line in journal.open("rb") if b'"step": 3' not in line and b'"step": 4' not in line)
    )
    with pytest.raises(MirrorError, match="has step 4 of this run, and .* ends at step 2: another host") as caught:
        train_run(load(mirrored()), run, is_quiet=True)
    assert f"move {run} away" in caught.value.hint


def test_an_outage_ends_no_training_that_is_here_and_begins_no_second_one(run, mirrored, tmp_path, capsys) -> None:
    shutil.rmtree(tmp_path / "bucket/a")
    (tmp_path / "bucket/a").write_text("no folder")
    recipe = mirrored()
    mirroring.restore(load(recipe), run, lambda line: print(line, file=sys.stderr))
    assert "whether the mirror is ahead of this disk is not known" in capsys.readouterr().err
    with pytest.raises(MirrorError, match="the mirror cannot be used"):
        train_run(load(recipe), tmp_path / "elsewhere/a", is_quiet=True)


def test_a_client_that_is_not_installed_is_said_before_anything_begins(mirrored, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mirroring, "is_installed", lambda place: False)
    with pytest.raises(RecipeError) as caught:
        train_run(load(mirrored(to="s3://bucket/a")), tmp_path / "runs/a", is_quiet=True)
    assert "mirror.to: `s3://bucket/a` needs the package `s3fs`, which is not installed" in str(caught.value)
    assert "hint: pip install 'finetune[s3]'" in str(caught.value)
    assert not (tmp_path / "runs").exists()
