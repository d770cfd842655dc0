"""The queue of milestones is killed, doubled and left without a Hub: nothing is published twice, out of order, or half."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.package.publish import queue
from finetune.store.checkpoints import manifest as manifests
from finetune.store.checkpoints import stored
from finetune.store.checkpoints.store import Store
from tests.forks import Popen
from tests.hub import Hub
from tests.hub.client import environment
from tests.hub.forks import Forks
from tests.hub.writes import User
from tests.lengths import length

TOKEN = "hf_" + "w" * 34
STEPS = (3, 6)


@pytest.fixture(scope="module")
def up(tmp_path_factory) -> Iterator[tuple[Hub, Forks]]:
    with Hub(seconds=1500) as hub:
        forks = Forks(hub, tmp_path_factory.mktemp("home"), TOKEN)
        yield hub, forks


@pytest.fixture
def hub(up) -> Hub:
    hub, _ = up
    hub.repos, hub.faults, hub.requests, hub.users = {}, [], [], {TOKEN: User("tiny")}
    return hub


@pytest.fixture
def forks(up) -> Forks:
    return up[1]


@pytest.fixture(scope="module")
def whole(trained) -> Path:
    """A run that is over, with two milestones, which look as if they were packaged: what is in a package is not the queue's to judge."""
    run = trained("fp32", publish={"repo": "tiny/new", "milestones": "3 steps"})
    for step in STEPS:
        directory = run / f"packages/step-{step:08d}"
        directory.mkdir(parents=True)
        save_file({"a": torch.arange(512.0) * step}, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps({"model_type": "none", "step": step}))
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def state(hub: Hub, packages: Path) -> list[int]:
    """The steps that are listed. What is there is old or new: a list in order whose branches are there, and of each branch nothing or all."""
    if ("model", "tiny/new") not in hub.repos:
        return []
    repo = hub.repos["model", "tiny/new"]
    for name in (name for name in repo.branches if name.startswith("step-")):
        there = {path: file.content for path, file in repo.at(name).files.items()}
        assert there in ({}, {path.name: path.read_bytes() for path in (packages / name).iterdir()}), f"{name} is torn"
    listed = repo.at("main").files.get("checkpoints.json")
    records = json.loads(listed.content)["checkpoints"] if listed else []
    for record in records:
        assert repo.branches[record["branch"]] == record["revision"]
        assert {name: repo.at(record["branch"]).files[name].sha256 for name in record["sha256"]} == record["sha256"]
    steps = [record["step"] for record in records]
    assert steps == list(STEPS[: len(steps)]), "not in order"
    return steps


def killed_and_finished(hub: Hub, forks: Forks, whole: Path, run: Path, fault: dict) -> bool:
    """Publishes the milestones of a run with a kill at a request, and once more; whether it was killed."""
    is_landed = fault["is_landed"]
    hub.fail(status=None if is_landed else 503, call=forks.kill, **fault)
    code = forks.run("publish", run, "--milestones")
    is_killed, last = code == -signal.SIGKILL, hub.requests[-1]
    assert is_killed or code == 0, forks.said.read_text()
    before = state(hub, whole / "packages")
    hub.faults = []
    assert forks.run("publish", run, "--milestones", "--json") == 0, forks.said.read_text()
    assert state(hub, whole / "packages") == list(STEPS)
    repo = hub.repos["model", "tiny/new"]
    titles = [re.sub(r" [0-9a-f]{12}$", "", commit.title) for commit in repo.commits.values()]
    assert titles[1:] == [title for step in STEPS for title in ("Stage: Publish", "Publish", f"List step {step}")], (
        titles
    )
    assert sorted(repo.branches) == ["main", *(f"step-{step:08d}" for step in STEPS)]
    lost = len(last.body) if is_killed and not is_landed and last.method == "PUT" else 0
    uploaded = sum(len(request.body) for request in hub.requests if request.method == "PUT")
    assert uploaded == sum(map(len, repo.objects.values())) + lost, "a byte was uploaded twice"
    assert not list((run / "packages").iterdir())
    if is_killed:
        done = [item["step"] for item in json.loads(forks.said.read_text().splitlines()[-1])["published"]]
        assert done == [step for step in STEPS if step in done], "not in order"
        assert {*STEPS} - {*before} <= {*done}, "what was missing"
    return is_killed


REQUESTS = {  # whether the Hub had acted on it is the last
    "uploaded": ("PUT", "", 0, True),
    "staging": ("POST", "/commit/staging", 0, False),
    "promoting the second": ("POST", "/commit/step-00000006", 0, False),
    "listed": ("POST", "/commit/main", 0, True),
    "listing the second": ("POST", "/commit/main", 1, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", REQUESTS.values(), ids=REQUESTS)
def test_killed_at_a_request_a_second_call_publishes_what_is_missing(where, hub, forks, whole, run) -> None:
    fault = dict(zip(("method", "pattern", "skip", "is_landed"), where, strict=True))
    assert killed_and_finished(hub, forks, whole, run, fault)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_requests_in_turn_a_second_call_publishes_what_is_missing(hub, forks, whole, tmp_path) -> None:
    stride, tried, number = length(3, 1), 0, 0
    while True:
        hub.repos, hub.faults, hub.requests = {}, [], []
        run = shutil.copytree(whole, tmp_path / "run")
        fault = {"method": ".*", "pattern": "", "skip": number // 2, "is_landed": number % 2 == 1}
        if not killed_and_finished(hub, forks, whole, run, fault):
            break
        shutil.rmtree(run)
        tried, number = tried + 1, number + stride  # odd: a request is lost now before, now after it was done
    assert number > 60 and tried > 60 // stride


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_changes_of_the_run_a_second_call_publishes_what_is_missing(hub, forks, trained, tmp_path) -> None:
    """Real packages, as one that was removed is made again."""
    whole = trained("fp32", publish={"repo": "tiny/new", "milestones": "6 steps"})
    packaged = shutil.copytree(whole, tmp_path / "packaged")
    assert forks.run("package", f"{packaged}@6", packaged / "packages/step-00000006") == 0, forks.said.read_text()
    run, change = tmp_path / "run", 0
    while True:
        hub.repos, hub.requests = {}, []
        shutil.copytree(packaged, run)
        code = forks.run("publish", run, "--milestones", under=run, change=change)
        assert code in (0, -signal.SIGKILL), forks.said.read_text()
        assert forks.run("publish", run, "--milestones") == 0, f"change {change}: {forks.said.read_text()}"
        repo = hub.repos["model", "tiny/new"]
        assert len(repo.commits) == 4, f"change {change}: the first one, staged, promoted, listed"
        assert (
            json.loads((run / "published/step-00000006.json").read_bytes())["revision"]
            == repo.branches["step-00000006"]
        )
        assert not list((run / "packages").iterdir()), f"change {change}"
        shutil.rmtree(run)
        if code == 0:
            break
        change += 3  # each takes a package to be made again
    assert change > 15


@pytest.mark.parametrize("torn", [b"", b"\0" * 64, b"{}", b"[]", b'{"step": 3, "run"'])
def test_a_torn_record_is_made_again_and_nothing_is_published_twice(torn, hub, forks, run, whole) -> None:
    (run / "published").mkdir()
    (run / "published/step-00000003.json").write_bytes(torn)
    assert forks.run("publish", run, "--milestones") == 0, forks.said.read_text()
    assert state(hub, whole / "packages") == list(STEPS)
    assert json.loads((run / "published/step-00000003.json").read_bytes())["step"] == 3


def test_milestones_do_not_go_to_a_folder_and_it_stays_as_it_is(hub, forks, run, tmp_path) -> None:
    assert forks.run("publish", run, "--milestones", "--to", f"folder:{tmp_path}/folder") == 1
    said = f"folder:{tmp_path}/folder: milestones go to branches, and a folder has none\nhint: "
    assert forks.said.read_text().startswith(said) and not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_milestones_do_not_go_where_everybody_sees_them_unless_that_is_asked_for(hub, forks, run) -> None:
    repo = hub.add("model", "tiny/new", is_private=False)
    assert forks.run("publish", run, "--milestones") == 1
    told = "tiny/new: is public, and the package is to be private\nhint: --public"
    assert told in forks.said.read_text() and list(repo.branches) == ["main"]
    assert forks.run("publish", run, "--milestones", "--follow") == 1
    assert "step 3 has to wait: is public, and the package is to be private" in forks.said.read_text()
    assert forks.run("publish", run, "--milestones", "--public") == 0, forks.said.read_text()
    assert sorted(repo.branches) == ["main", "step-00000003", "step-00000006"]


def test_a_list_that_people_put_on_the_hub_is_not_overwritten_unasked(hub, forks, run) -> None:
    repo = hub.add("model", "tiny/new", is_private=True, readers={TOKEN})
    repo.commit({"checkpoints.json": b'["mine"]'})
    assert forks.run("publish", run, "--milestones") == 1
    told = "tiny/new: would overwrite what people added: checkpoints.json\nhint: copy what you want to keep"
    assert told in forks.said.read_text() and repo.at("main").files["checkpoints.json"].content == b'["mine"]'
    assert forks.run("publish", run, "--milestones", "--replace") == 0, forks.said.read_text()


def test_milestones_of_other_runs_and_what_people_added_to_the_list_stay(hub, forks, run) -> None:
    others = [{"run": "other", "step": step, "branch": f"step-{step:08d}", "revision": "0"} for step in (2, 6, 9)]
    repo = hub.add("model", "tiny/new", is_private=True, readers={TOKEN})
    repo.commit({"checkpoints.json": json.dumps({"about": "ours", "checkpoints": others}).encode()})
    assert forks.run("publish", run, "--milestones") == 0, forks.said.read_text()
    listed = json.loads(repo.at("main").files["checkpoints.json"].content)
    assert listed["about"] == "ours" and [one["step"] for one in listed["checkpoints"]] == [2, 3, 6, 9]
    assert [one["step"] for one in listed["checkpoints"] if one["run"] == "other"] == [2, 9], "branch 6 has this run's"


def test_looking_for_milestones_again_reads_no_manifest_again(whole, monkeypatch) -> None:
    store, reads = Store(whole), []
    monkeypatch.setattr(stored, "read", lambda path: reads.append(path) or manifests.read(path))
    assert [queue.pending(whole, store) for _ in range(3)] == [list(STEPS)] * 3
    assert len(reads) == len(store.summaries())


def test_a_run_that_is_not_there_is_not_followed(forks, tmp_path) -> None:
    assert forks.run("publish", tmp_path / "none", "--milestones", "--follow") == 1
    assert forks.said.read_text().startswith(f"{tmp_path}/none: is not a run directory")


@pytest.mark.parametrize("source", ["nonexistent", "no/such", "./none", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_checkpoint_is_told_so(source, hub, forks) -> None:
    assert forks.run("publish", source, "--to", "tiny/new") == 1
    hint = "hint: name a folder that `finetune package` made, or RUN@STEP, RUN@last or RUN@best\n"
    assert forks.said.read_text() == f"{source}: is neither a folder nor a checkpoint of a run\n{hint}"
    assert not hub.requests


def wait_for(condition: Callable[[], object], child: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and child.poll() is None, "it ended, or did not come that far"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("outage", ["refused", "unavailable", "silent"])
def test_a_hub_that_is_down_while_training_is_not_waited_for_and_is_caught_up_with(
    outage, recipe_file, tmp_path
) -> None:
    """The Hub comes back when the last checkpoint is there: a training that waited for it would never end."""
    sections = {"train": {"steps": 12, "batch_size": 6, "precision": "fp32"}, "checkpoint": {"every": "4 steps"}}
    recipe, run = recipe_file(publish={"repo": "tiny/new", "milestones": "4 steps"}, **sections), tmp_path / "run"
    last = run / "checkpoints/step-00000012"
    hub = Hub(seconds=590)
    hub.users[TOKEN] = User("tiny")
    env, port = environment(hub, tmp_path, HF_TOKEN=TOKEN), int(hub.url.rpartition(":")[2])
    command = [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(run), "--quiet"]
    child = Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for((run / "publish.log").exists, child)  # the training has asked for its right to publish, and begins
        if outage == "refused":
            hub.close()
        elif outage == "unavailable":
            hub.fail(".*", "", 503, times=100_000)
        else:
            hub.fail(".*", "", None, call=lambda: wait_for(last.is_dir, child), times=100_000)
        assert not last.exists()
        wait_for(last.is_dir, child)
        hub.faults = []
        if outage == "refused":
            hub = Hub(port=port, seconds=590)
            hub.users[TOKEN] = User("tiny")
        _, said = child.communicate(timeout=300)
    finally:
        child.kill()
        child.wait()
        hub.close()
    assert child.returncode == 0, said + (run / "publish.log").read_text()
    assert "finished at step 12" in said
    listed = hub.repos["model", "tiny/new"].at("main").files["checkpoints.json"].content
    assert [record["step"] for record in json.loads(listed)["checkpoints"]] == [4, 8, 12]
