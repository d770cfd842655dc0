"""A run that is mirrored beside its training, and goes on elsewhere from there."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from finetune.errors import CheckpointError, MirrorError
from finetune.recipe.load import load
from finetune.store import cache
from finetune.store.checkpoints.refs import find, parse
from finetune.store.mirror import following, replica
from finetune.store.run import inspect, journal
from finetune.store.run.directory import RunDirectory
from finetune.training.run import train as train_run
from tests import forks
from tests.stories.same_run import assert_same_run

COMMITS = {"every": "2 steps", "keep": {"last": 2}}


@pytest.fixture
def recipe(recipe_file, tmp_path) -> Path:
    mirror = {"to": f"file://{tmp_path}/bucket/{{run}}", "keep": {"last": 2}}
    return recipe_file(mirror=mirror, checkpoint=COMMITS, evaluate={"every": "3 steps"})


def test_a_run_goes_on_elsewhere_from_its_mirror_to_the_same_bits(recipe, recipe_file, tmp_path, capsys) -> None:
    alone = recipe_file("alone", checkpoint=COMMITS, evaluate={"every": "3 steps"})
    train_run(load(alone), tmp_path / "alone", is_quiet=True)
    capsys.readouterr()
    place, run, other = f"file://{tmp_path}/bucket/a", tmp_path / "runs" / "a", tmp_path / "other" / "a"
    train_run(load(recipe), run, is_quiet=True, until=4)
    said = capsys.readouterr().err
    assert f"mirror: {place}\n" in said
    assert "mirror: mirrored step 4\n" in said
    shutil.rmtree(run)
    train_run(load(recipe), other, is_quiet=True)
    said = capsys.readouterr().err
    assert f"restored step 4 from {place}\n" in said
    assert "resumed from step 4\n" in said
    assert_same_run(other, tmp_path / "alone")
    assert not [record for record in journal.read(other) if record.get("event") == "not_exact"]
    assert following.send(other, None) == {"mirror": place, "sent": [], "steps": [9, 10], "missing": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sections) -> str:
    """The address of a mirror with three commits of a run; the run itself is gone."""
    folder = tmp_path_factory.mktemp("mirror")
    recipe = {
        **tiny_sections,
        "adapter": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"steps": 6, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
        "checkpoint": {"every": "2 steps", "keep": {"last": 9}},
        "evaluate": {"every": "2 steps"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    train_run(load(folder / "tiny.yaml"), folder / "a", is_quiet=True)
    following.send(folder / "a", f"file://{folder}/bucket")
    # Its mirror keeps the two newest, and the best, which is the last.
    shutil.rmtree(folder / "a")
    return f"file://{folder}/bucket"


def test_a_mirror_is_listed_like_a_run(place, capsys) -> None:
    run = replica.run_of(place)
    facts = inspect.log(run)
    assert facts["run"] == place
    assert [row["ref"] for row in facts["checkpoints"]] == [f"{place}@4", f"{place}@6"]
    shown = inspect.describe(f"{place}@4")
    assert (shown["step"], shown["ref"]) == (4, f"{place}@4")
    # Neither fetched any weights.
    assert [path.name for path in run.rglob("*") if path.parent.parent.name == "checkpoints"] == ["manifest.json"] * 2


@pytest.mark.slow
def test_a_ref_of_a_mirror_is_fetched_and_used_like_one_of_a_run(place, finetune, tmp_path) -> None:
    log = finetune("log", place, "--json")
    assert [row["step"] for row in json.loads(log.stdout)["checkpoints"]] == [4, 6]
    evaluated = finetune("evaluate", f"{place}@6", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    (result,) = json.loads(evaluated.stdout)["results"]
    assert result["metrics"]["loss"] == json.loads(log.stdout)["checkpoints"][1]["metrics"]["loss"]
    packaged = finetune("package", f"{place}@best", tmp_path / "package", "--json")
    assert packaged.returncode == 0, packaged.stderr
    assert (tmp_path / "package" / "model.safetensors").exists()
    assert finetune("verify", place).stdout == "every byte is as it was committed\n"
    assert "loss" in finetune("curves", place).stdout
    assert finetune("report", place, "--output", tmp_path / "report.html").returncode == 0
    refused = finetune("replay", place, "--steps", 5)
    assert refused.returncode == 2
    assert "is a mirror; name a directory on this disk, where `finetune train` restores the run" in refused.stderr


@pytest.mark.slow
def test_a_recipe_may_begin_with_a_checkpoint_in_a_mirror(place, recipe_file, train, tmp_path, capsys) -> None:
    recipe = recipe_file(base={"checkpoint": f"{place}@6"}, adapter=None, train={"steps": 2, "precision": "fp32"})
    run = train(recipe, tmp_path / "run")
    before = (RunDirectory(run).checkpoint(2) / "model.safetensors").read_bytes()
    shutil.rmtree(cache.root() / replica.KIND)
    assert train(recipe, run) == run
    assert "resumed from step 2" in capsys.readouterr().err
    assert (RunDirectory(run).checkpoint(2) / "model.safetensors").read_bytes() == before


def test_a_flipped_byte_is_named_where_a_ref_is_fetched(place, tmp_path, monkeypatch) -> None:
    copy = shutil.copytree(place.removeprefix("file://"), tmp_path / "bucket")
    (piece,) = [
        path
        for path in (copy / "blobs").rglob("*")
        if path.is_file()
        and path.stat().st_size == max(each.stat().st_size for each in (copy / "blobs").rglob("*") if each.is_file())
    ][:1]
    data = bytearray(piece.read_bytes())
    data[-1] ^= 1
    piece.chmod(0o644)
    piece.write_bytes(data)
    with pytest.raises(MirrorError, match=f"the object blobs/../{piece.name} is damaged"):
        for step in (4, 6):
            find(parse(f"file://{copy}@{step}"))


def test_what_changes_in_a_mirror_is_seen(place, tmp_path) -> None:
    copy = shutil.copytree(place.removeprefix("file://"), tmp_path / "bucket")
    ref = f"file://{copy}@last"
    assert find(parse(ref)).step == 6
    (newest,) = (copy / "commits").glob("step-00000006-*")
    newest.unlink()
    assert find(parse(ref)).step == 4
    with pytest.raises(CheckpointError, match="has no step 6; committed: 4"):
        find(parse(f"file://{copy}@6"))
    with pytest.raises(MirrorError, match="there is no commit of a run"):
        parse(f"file://{tmp_path}/nothing@4")


@pytest.mark.slow
def test_the_last_commit_after_a_signal_is_mirrored(recipe, tmp_path) -> None:
    run = tmp_path / "runs" / "a"
    command = [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(run), "--set", "train.steps=5000"]
    process = forks.Popen([*command, "--set", "checkpoint.every=1000 steps"], stderr=forks.PIPE, text=True)
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("step ") for line in lines)
    process.send_signal(signal.SIGTERM)
    said = "".join(lines)
    assert process.wait(60) == 128 + signal.SIGTERM
    last = RunDirectory(run).stored_steps()[-1]
    assert f"mirror: mirrored step {last}\n" in said


@pytest.mark.slow
def test_a_run_that_loses_its_disk_again_and_again_ends_with_the_same_bits(recipe_file, tmp_path) -> None:
    sections = {"checkpoint": {"every": "1 step", "save_best": False}, "evaluate": {"every": "5 steps"}}
    sections["train"] = {"steps": 16, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    train_run(load(recipe_file("alone", **sections)), tmp_path / "alone", is_quiet=True)
    recipe = recipe_file(mirror=f"file://{tmp_path}/bucket", **sections)
    run, restored = tmp_path / "runs" / "a", []
    for attempt in range(4):
        command = [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(run), "--quiet"]
        process = forks.Popen(command, stderr=forks.PIPE, text=True)
        for line in iter(process.stderr.readline, ""):
            restored += [int(line.split()[2])] if line.startswith("restored step") else []
            if line.startswith("mirror: mirrored step") and attempt < 3:
                process.kill()
        if process.wait(60) == 0:
            break
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)  # its mirror may have written its lock meanwhile
    assert process.returncode == 0
    assert restored and restored == sorted(restored)
    assert_same_run(run, tmp_path / "alone")
