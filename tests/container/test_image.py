"""The image that `scripts/container` has built: what is in it, and a training in it from the plan to the package."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from finetune import __version__
from finetune.store.run import journal
from tests.container.runner import Container, Image, from_environment
from tests.stories.same_run import assert_same_run

pytestmark = pytest.mark.skipif("FINETUNE_TEST_IMAGE" not in os.environ, reason="scripts/container builds the image")
STEPS = 60


@pytest.fixture(scope="session")
def image() -> Image:
    return from_environment()


@pytest.fixture
def host(tmp_path, tiny_base, chat_data) -> Path:
    """A host's folders: empty ones for the volumes, recipes, a base and data."""
    for name in ("cache", "runs", "recipes"):
        (tmp_path / name).mkdir()
    for name in ("cache", "runs"):
        os.chown(tmp_path / name, 10001, 10001)
    recipe = {
        "base": {"checkpoint": "base"},
        "task": {"name": "chat", "max_length": 64},
        "data": {part: [{"path": f"data/{part}.jsonl"}] for part in ("train", "holdout")},
        "adapter": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": STEPS, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
        "checkpoint": {"every": "20 steps"},
    }
    (tmp_path / "recipes/tiny.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(chat_data, tmp_path / "data")
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path


def container(image: Image, host: Path, *arguments: object, **options: str) -> Container:
    """As `docker run --read-only -v …/cache:/cache -v …/runs:/runs -v …/recipes:/runs/recipes:ro … IMAGE ARGUMENTS`."""
    volumes = {f"/{name}": host / name for name in ("cache", "runs")}
    read_only = {f"/runs/{name}": host / name for name in ("recipes", "base", "data")}
    return Container(image, *arguments, volumes=volumes, read_only=read_only, **options)


def done(image: Image, host: Path, *arguments: object, **options: str) -> str:
    """The stdout of what has to succeed."""
    with container(image, host, *arguments, **options) as running:
        code, stdout, stderr = running.end()
    assert code == 0, stderr
    return stdout


def wait_for_step(step: int, run: Path, running: Container) -> None:
    deadline = time.monotonic() + 200
    while max(journal.steps(journal.read(run)), default=0) < step:
        assert running.process.poll() is None, running.end()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_an_engine_has_to_know_is_said(image) -> None:
    config = image.config
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["finetune"] and config["Cmd"] == ["--help"]
    assert config["Volumes"].keys() == {"/cache", "/runs"} and config["WorkingDir"] == "/runs"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "finetune", "health"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["title"] == "finetune" and labels["licenses"] == "Apache-2.0" and len(labels["revision"]) == 40
    assert labels["version"] == __version__
    variables = dict(variable.split("=", 1) for variable in config["Env"])
    assert variables["HF_HOME"].startswith("/cache/") and variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert not [name for name in variables if any(word in name for word in ("TOKEN", "SECRET", "PASSWORD"))]


COMPILER = re.compile(
    r"(.*-)?(cc|gcc|g\+\+|c\+\+|cpp|clang|ld|as)(-[\d.]+)?|cc1.*|make|nvcc|cmake|ninja|rustc|go|ptxas"
)
SECRETS = {".netrc", ".git-credentials", ".pypirc", "pip.conf", "token", "stored_tokens", "id_rsa", ".npmrc", ".env"}
CACHES = {"root/.cache", "var/lib/apt/lists", "var/cache/apt", "cache", "runs", "tmp", "build", "mnt", "opt/package"}


def test_no_secret_cache_compiler_or_test_is_in_any_of_its_layers(image) -> None:
    """What a layer adds and a later one removes is still handed out."""
    found, count = [], 0
    for layer in image.layers():
        for member in layer:
            place = Path(member.name)
            count += 1
            has_content = member.isfile() and member.size  # what a layer takes away is an empty file there
            is_secret = place.name in SECRETS and has_content
            is_cached = has_content and any(place.is_relative_to(cache) for cache in CACHES)
            is_compiler = place.parent.name in ("bin", "sbin") and COMPILER.fullmatch(place.name)
            is_test = not {".git", "tests", ".hypothesis"}.isdisjoint(place.parts)
            if is_secret or is_cached or is_compiler or is_test:
                found.append(member.name)
    assert count > 10_000 and found == []


def test_nothing_in_it_can_be_changed_by_its_user(image) -> None:
    programs = image.root / "opt/finetune"
    writable = [
        path
        for path in programs.rglob("*")
        if not path.is_symlink() and (path.stat().st_uid or path.stat().st_mode & 0o022)
    ]
    assert writable == []


def test_without_arguments_it_explains_itself(image, host) -> None:
    assert done(image, host).startswith("Usage: finetune [OPTIONS] COMMAND")
    assert "warnings" in json.loads(done(image, host, "doctor", "--json"))


@pytest.mark.timeout(900)
def test_a_training_in_it_is_stopped_resumed_packaged_and_published(image, host) -> None:
    whole, run, recipe = host / "runs/whole", host / "runs/tiny", "recipes/tiny.yaml"
    assert json.loads(done(image, host, "plan", recipe, "--json"))["steps"] == STEPS
    done(image, host, "launch", recipe, "--run", "whole", "--quiet")
    with container(image, host, "launch", recipe) as running:
        wait_for_step(7, run, running)
        running.stop()
        code, _, said = running.end()
    assert code == 143, said
    stopped_at = max(journal.steps(journal.read(run)))
    assert (run / f"checkpoints/step-{stopped_at:08}/manifest.json").exists(), said
    done(image, host, "launch", "--nproc-per-node", 1, recipe)
    assert_same_run(whole, run)
    assert (run / "journal.jsonl").stat().st_uid == 10001
    done(image, host, "package", "tiny@best", "packaged")
    done(image, host, "verify", "packaged")
    figures = json.loads(done(image, host, "evaluate", "tiny@0", "tiny@best", "--json"))
    assert figures
    done(image, host, "publish", "packaged", "--to", "folder:/runs/published")
    assert (host / "runs/published/model.safetensors").exists() or (
        host / "runs/published/adapter_model.safetensors"
    ).exists()


def test_the_healthcheck_tells_a_hung_training(image, host) -> None:
    run, check = host / "runs/tiny", image.config["Healthcheck"]["Test"][1:]
    options = ("--set", "train.steps=100000", "--set", "checkpoint.every=9999 steps")
    with container(image, host, "launch", "recipes/tiny.yaml", *options) as running:
        wait_for_step(5, run, running)
        answer = running.execute(*check)
        assert answer.returncode == 0 and answer.stdout.startswith("/runs/tiny: training at step "), answer
        for rank in running.pid_1.children():
            rank.send_signal(signal.SIGSTOP)
        time.sleep(5)
        answer = running.execute(*check, "--patience", "1")
        assert answer.returncode == 1 and answer.stdout.startswith("/runs/tiny: hung at step "), answer


def test_any_user_may_train_in_a_folder_of_theirs(image, host) -> None:
    for name in ("cache", "runs"):
        os.chown(host / name, 4321, 4321)
    done(image, host, "launch", "recipes/tiny.yaml", "--set", "train.steps=2", "--quiet", user="4321:4321")
    assert (host / "runs/tiny/plan.json").stat().st_uid == 4321


@pytest.mark.parametrize("place", ["runs", "cache"])
def test_a_volume_that_they_may_not_write_is_told(place, image, host) -> None:
    os.chown(host / place, 0, 0)
    said = refused(image, host)
    assert f"/{place}" in said and "hint:" in said, said


@pytest.mark.parametrize("place", ["base", "base/model.safetensors", "data", "data/train.jsonl", "recipes/tiny.yaml"])
def test_what_they_may_not_read_is_told(place, image, host) -> None:
    (host / place).chmod(0o700)
    said = refused(image, host)
    assert place.partition("/")[0] in said and ("hint: let user 10001 read it" in said or "is not readable" in said), (
        said
    )


def refused(image: Image, host: Path) -> str:
    """What is said by a training that cannot be."""
    with container(image, host, "launch", "recipes/tiny.yaml") as running:
        code, _, said = running.end()
    assert code in (1, 2) and "Traceback" not in said, said
    return said
