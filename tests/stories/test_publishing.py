"""From a base on the Hub to a new checkpoint on the Hub and back: trained, published, verified, and loaded by others in a clean cache."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.recipe.load import load
from finetune.training.run import train
from tests import forks
from tests.hub import Hub
from tests.hub.client import environment, in_turn
from tests.hub.writes import User

TOKEN = "hf_" + "w" * 34
SECRET = "planted-secret-of-a-tracker"
LORA = {"name": "lora", "rank": 4, "alpha": 8}
FORMS = {
    "full": ({}, {"max_shard_bytes": 30_000}, "bf16"),
    "merged": ({"adapter": LORA}, {}, "fp32"),
    "adapter": ({"adapter": LORA}, {"form": "adapter"}, "fp32"),
}
LOADED_BY_OTHERS = """
import json, sys
import torch
from tests import forks
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, revision, form, out = sys.argv[1:]
kind = AutoPeftModelForCausalLM if form == "adapter" else AutoModelForCausalLM
model = kind.from_pretrained(repo, revision=revision, **({"torch_dtype": torch.float32} if form == "adapter" else {}))
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
said = json.load(open(out))
sequences = torch.arange(4 * 64) * 2_654_435_761 % model.config.get_text_config().vocab_size
with torch.inference_mode():
    logits = model(input_ids=sequences.reshape(4, 64), use_cache=False).logits.float()
apart = max(
    (logits[item["row"], item["position"], item["tokens"]] - torch.tensor(item["logits"])).abs().max().item()
    for item in said["likeliest"]["batch"]
)
print(json.dumps({"apart": apart, "template": bool(tokenizer.chat_template)}))
"""


@pytest.fixture
def hub(tiny_base):
    with Hub(seconds=280) as hub:
        hub.users[TOKEN] = User("tiny")
        hub.add("model", "tiny/base").commit_directory(tiny_base)
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_was_trained_is_what_others_load_from_the_hub(form, hub, recipe_file, chat_data, tmp_path: Path) -> None:
    sections, package, precision = FORMS[form]
    train = {"steps": 6, "batch_size": 6, "precision": precision}
    recipe = recipe_file(
        base={"checkpoint": "tiny/base"}, package=package, publish={"repo": "tiny/new"}, train=train, **sections
    )
    env, run = environment(hub, tmp_path, HF_TOKEN=TOKEN, TRACKER_API_KEY=SECRET), tmp_path / "run"
    results = in_turn(
        env,
        ("train", recipe, "--run", run, "--quiet"),
        ("publish", f"{run}@last", "--tag", "v1", "--json"),
        ("publish", f"{run}@last", "--tag", "v1", "--json"),
        ("verify", "hub:tiny/new@v1", "--json"),
    )
    assert [code for code, _, _ in results] == [0, 0, 0, 0], results
    published, again, verified = (json.loads(printed) for _, printed, _ in results[1:])
    assert published["commits"] == 2 and (again["commits"], again["revision"]) == (0, published["revision"])
    assert verified["ok"] and {"hub", "provenance", "logits"} <= set(verified["checks"])
    assert verified["revision"] == published["revision"] == hub.repos["model", "tiny/new"].tags["v1"]
    clean = environment(hub, tmp_path / "elsewhere", HF_TOKEN=TOKEN)
    probe = run / "packages/step-00000006/training/probe.json"
    command = [sys.executable, "-c", LOADED_BY_OTHERS, "tiny/new", "v1", form, str(probe)]
    done = forks.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"apart": 0.0, "template": True}
    row = json.loads((chat_data / "train.jsonl").read_text().splitlines()[3])["messages"][-1]["content"]
    host = socket.gethostname()
    private = [TOKEN, SECRET, row, str(tmp_path), str(chat_data), *([host] if len(host) > 5 else [])]
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "Authorization"}
        told = request.body + f"{request.path} {request.query} {others}".encode()
        assert not [word for word in private if word.encode() in told], f"{request.method} {request.path}"
    for path in (path for path in run.rglob("*") if path.is_file()):
        assert not [word for word in (TOKEN, SECRET) if word.encode() in path.read_bytes()], path
    assert not [word for word in (TOKEN, SECRET) for _, *streams in results if word in "".join(streams)]


@pytest.mark.slow
def test_a_repository_that_was_tampered_with_fails_verification(hub, recipe_file, tmp_path: Path) -> None:
    recipe = recipe_file(base={"checkpoint": "tiny/base"}, publish={"repo": "tiny/new"})
    env, run = environment(hub, tmp_path, HF_TOKEN=TOKEN), tmp_path / "run"
    for code, _, said in in_turn(env, ("train", recipe, "--run", run, "--quiet"), ("publish", f"{run}@last")):
        assert code == 0, said
    repo = hub.repos["model", "tiny/new"]
    content = bytearray(repo.at("main").files["model.safetensors"].content)
    content[-2] ^= 1
    repo.commit({"model.safetensors": bytes(content)})
    hub.fail("GET", r"resolve/.*/config.json", None, is_corrupt=True)
    ((code, printed, _),) = in_turn(env, ("verify", "hub:tiny/new", "--json"))
    found = {(problem["check"], problem["file"]) for problem in json.loads(printed)["problems"]}
    assert code == 1 and {("provenance", "model.safetensors"), ("hub", "config.json")} <= found


@pytest.fixture
def milestones(hub, recipe_file, tmp_path: Path):
    """(environment, command, run): a training of 12 steps whose every fourth is a milestone."""
    recipe = recipe_file(
        base={"checkpoint": "tiny/base"},
        publish={"repo": "tiny/new", "milestones": "4 steps"},
        train={"steps": 12, "batch_size": 6, "precision": "fp32"},
        checkpoint={"every": "2 steps", "keep": {"last": 1}},
    )
    run = tmp_path / "run"
    env = environment(hub, tmp_path, HF_TOKEN=TOKEN)
    return env, [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(run), "--quiet"], run


def published(hub: Hub) -> dict[str, list[int]]:
    repo = hub.repos["model", "tiny/new"]
    listed = json.loads(repo.at("main").files["checkpoints.json"].content)["checkpoints"]
    for record in listed:
        commit = repo.at(record["branch"])
        assert commit.oid == record["revision"] and repo.commits[commit.parent].parent is None, (
            "one commit on the first"
        )
        assert {name: commit.files[name].sha256 for name in record["sha256"]} == record["sha256"]
    assert [branch for branch in repo.branches if branch.startswith("staging")] == []
    branches = sorted(int(name[5:]) for name in repo.branches if name.startswith("step-"))
    return {"listed": [record["step"] for record in listed], "branches": branches}


@pytest.mark.slow
def test_milestones_are_published_while_the_training_goes_on_and_caught_up_at_its_end(hub, milestones) -> None:
    env, command, run = milestones
    hub.fail("POST", "/commit/", 503, times=3)
    done = forks.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr + (run / "publish.log").read_text()
    assert published(hub) == {"listed": [4, 8, 12], "branches": [4, 8, 12]}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (4, 8, 12)
    ], "milestones stay, though the keep rule asks for one checkpoint"


@pytest.mark.slow
def test_a_hub_that_is_down_costs_the_training_nothing_and_is_caught_up_with_by_hand(hub, milestones) -> None:
    env, command, run = milestones
    hub.fail("POST|PUT", "", 500, times=10_000)
    done = forks.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1 and "steps [4, 8, 12] are not published" in done.stderr
    assert "finished at step 12" in done.stderr and f"finetune publish {run} --milestones" in done.stderr
    hub.faults = []
    ((code, printed, said),) = in_turn(env, ("publish", run, "--milestones", "--json"))
    assert code == 0, said
    assert [item["step"] for item in json.loads(printed)["published"]] == [4, 8, 12]
    assert published(hub) == {"listed": [4, 8, 12], "branches": [4, 8, 12]}


@pytest.mark.slow
def test_a_training_that_cannot_be_published_says_so_before_it_begins(hub, milestones) -> None:
    env, command, run = milestones
    hub.users["hf_" + "r" * 34] = User("tiny", "read")
    done = forks.run(command, env=env | {"HF_TOKEN": "hf_" + "r" * 34}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not run.exists()
    assert "tiny/new: cannot be published to: the token of tiny only reads\nhint: " in done.stderr


@pytest.mark.slow
def test_what_cannot_be_published_is_one_error_before_anything_is_trained(hub, recipe_file, tmp_path) -> None:
    recipe = recipe_file(base={"checkpoint": "tiny/base"}, publish={"repo": "tiny/new", "milestones": "4 steps"})
    env, run = environment(hub, tmp_path, HF_TOKEN=TOKEN), tmp_path / "run"
    without = {name: value for name, value in env.items() if name != "HF_TOKEN"}
    commands = ("plan", recipe, "--json"), ("train", recipe, "--run", run)
    no_token = "tiny/new: there is no token for the Hub\nhint: set HF_TOKEN to a token with write access"
    for code, printed, said in in_turn(without, *commands):
        assert code == 1 and said.startswith(no_token) and "Traceback" not in said
        assert not printed or json.loads(printed)["error"]["code"] == "publish"
    hub.add("model", "tiny/new", is_private=False)
    for code, _, said in in_turn(env, *commands):
        assert code == 1 and said.startswith("tiny/new: is public, and the package is to be private\nhint: --public")
    assert not run.exists()


@pytest.mark.slow
def test_where_the_hub_is_out_of_reach_a_plan_says_that_rights_are_not_known(hub, recipe_file, tmp_path) -> None:
    recipe = recipe_file(publish={"repo": "tiny/new"})
    env = environment(hub, tmp_path, HF_TOKEN=TOKEN)
    ((code, printed, said),) = in_turn(env | {"HF_HUB_OFFLINE": "1"}, ("plan", recipe, "--json"))
    assert code == 0 and json.loads(printed)["steps"]
    assert "not known whether tiny/new can be published to: HF_HUB_OFFLINE is set\n" in said


@pytest.fixture
def unpublished(hub, recipe_file, tmp_path: Path) -> tuple[dict[str, str], Path]:
    """(environment, run): a training with three milestones is over, and nothing of it has reached the Hub."""
    sections = {"train": {"steps": 12, "batch_size": 6, "precision": "fp32"}, "checkpoint": {"every": "12 steps"}}
    recipe, run = recipe_file(publish={"repo": "tiny/new", "milestones": "4 steps"}, **sections), tmp_path / "run"
    train(load(recipe), run, is_quiet=True)
    return environment(hub, tmp_path, HF_TOKEN=TOKEN), run


KILLS = [  # (request, skipped before it, whether the Hub had acted on it)
    ("POST", "/commit/staging", 0, True),
    ("POST", "/commit/step-", 0, False),
    ("DELETE", "/branch/staging", 0, True),
    ("POST", "/commit/main", 0, True),
    ("POST", "/commit/main", 1, False),
]


@pytest.mark.slow
def test_a_queue_that_is_killed_again_and_again_publishes_everything_once_and_in_order(hub, unpublished) -> None:
    env, run = unpublished
    command = [sys.executable, "-m", "finetune", "publish", str(run), "--milestones"]
    for method, path, skip, is_landed in KILLS:
        child = forks.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        hub.faults = []
        hub.fail(method, path, None if is_landed else 503, skip=skip, is_landed=is_landed, call=child.kill)
        _, said = child.communicate(timeout=100)
        assert child.returncode == -9, said.decode()
        repo = hub.repos["model", "tiny/new"]
        listed = repo.at("main").files.get("checkpoints.json")
        steps = [record["step"] for record in json.loads(listed.content)["checkpoints"]] if listed else []
        assert steps == [4, 8, 12][: len(steps)], "in order, and never half a list"
    hub.faults = []
    (run / "published/step-00000004.json").write_bytes(b"")  # a record that the disk has lost
    done = forks.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert published(hub) == {"listed": [4, 8, 12], "branches": [4, 8, 12]}
    repo = hub.repos["model", "tiny/new"]
    made = [commit.title for commit in repo.commits.values()]
    assert len([title for title in made if title.startswith("List step")]) == 3, made
    assert len([title for title in made if title.startswith("Publish")]) == 3, made
    weights = sum(len(content) for content in repo.objects.values())
    assert sum(len(request.body) for request in hub.requests if request.method == "PUT") == weights, "no byte twice"
    assert sorted(path.name for path in (run / "published").iterdir()) == [
        f"step-{step:08d}.json" for step in (4, 8, 12)
    ]
    assert not list((run / "packages").iterdir())


@pytest.mark.slow
def test_two_processes_do_not_publish_a_run_at_once(hub, unpublished) -> None:
    env, run = unpublished
    command = [sys.executable, "-m", "finetune", "publish", str(run), "--milestones"]
    hub.fail("POST", "/commit/staging", None, seconds=15)
    first = forks.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: hub.seen("POST", "/commit/staging"))
    ((code, _, said),) = in_turn(env, ("publish", run, "--milestones"))
    assert code == 1 and f"{run}: another process is publishing its milestones\nhint: wait for it" in said
    beside = forks.Popen([*command, "--follow"], env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert first.wait(100) == 0, first.stderr.read()
    assert beside.wait(100) == 0, beside.stderr.read()
    assert published(hub) == {"listed": [4, 8, 12], "branches": [4, 8, 12]}
    for process in (first, beside):
        process.stderr.close()


def wait_for(condition: Callable[[], object], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_neither_a_package_nor_a_checkpoint_is_told_so(tmp_path) -> None:
    env = dict(os.environ)
    (code, _, said), (other, _, none) = in_turn(
        env,
        ("publish", "non/existent", "--to", f"folder:{tmp_path}/copy"),
        ("publish", tmp_path / "none", "--milestones"),
    )
    assert other == 1 and "none: is not a run directory: it has no plan.json" in none and "Traceback" not in none
    assert code == 1 and said.startswith("non/existent: is neither a folder nor a checkpoint of a run\nhint: ")
