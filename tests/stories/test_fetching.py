"""The shards of a base come from the Hub in parallel, survive a kill, and are all that a training needs without a network."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests import forks
from tests.hub.client import in_turn
from tests.hub.server import Fault

SHARD = r"/model-\d+-of-\d+\.safetensors$"


@pytest.fixture
def shards(hub, tiny_base: Path, tiny_tokenizer, tmp_path: Path):
    """`tiny/shards`, in several files, with a second copy of its weights and code beside them."""
    directory = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(directory, max_shard_size="30KB")
    tiny_tokenizer.save_pretrained(directory)
    repo = hub.add("model", "tiny/shards")
    repo.commit_directory(directory)
    repo.commit({"consolidated.safetensors": b"a second copy", "modeling_own.py": b"raise SystemExit\n"})
    return repo


@pytest.fixture
def recipe(recipe_file, shards) -> Path:
    return recipe_file(base={"checkpoint": "tiny/shards"}, train={"steps": 2, "batch_size": 6, "precision": "fp32"})


def gets(hub, pattern: str = SHARD) -> list[str]:
    return [request.path for request in hub.seen("GET", pattern)]


@pytest.mark.slow
def test_shards_are_downloaded_at_once_and_each_of_them_once(hub, online, shards, recipe) -> None:
    names = [name for name in shards.at("main").files if name.startswith("model-0")]
    assert len(names) >= 4
    together = threading.Barrier(3)  # three requests wait for one another
    hub.faults.append(Fault("GET", SHARD, call=lambda: together.wait(timeout=60), times=3))
    ((code, said, errors),) = in_turn(online, ("fetch", recipe))
    assert code == 0, errors
    assert sorted(path.rpartition("/")[2] for path in gets(hub)) == sorted(names)
    assert not gets(hub, r"consolidated|\.py$")
    for name in names:
        assert (Path(said.strip()) / name).read_bytes() == shards.at("main").files[name].content


def killed_at_a_shard(hub, recipe: Path, env: dict[str, str], number: int) -> None:
    """Kills a `fetch` while it downloads a shard, after `number` - 1 others have been asked for."""
    is_there, is_over = threading.Event(), threading.Event()

    def stop() -> None:
        is_there.set()
        is_over.wait(60)

    hub.faults.append(Fault("GET", SHARD, call=stop, skip=number - 1))
    process = forks.Popen(
        [sys.executable, "-m", "finetune", "fetch", str(recipe)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert is_there.wait(100)
    blobs = Path(env["HF_HOME"], "hub/models--tiny--shards/blobs")
    deadline = time.monotonic() + 60
    while len(list(blobs.glob("*.incomplete"))) != 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # the other shards arrive meanwhile
    process.kill()
    process.wait(60)
    is_over.set()


@pytest.mark.slow
def test_a_killed_download_goes_on_with_what_it_lacks_and_trains_without_a_network(
    hub, online, shards, recipe, finetune, tmp_path
) -> None:
    killed_at_a_shard(hub, recipe, online, 3)
    blobs = Path(online["HF_HOME"], "hub/models--tiny--shards/blobs")
    (left,) = blobs.glob("*.incomplete")
    before = gets(hub)
    ((code, said, errors),) = in_turn(online, ("fetch", recipe))
    assert code == 0, errors
    again = gets(hub)[len(before) :]
    assert len(again) == 1 and again[0] in before, "only what was under way is asked for again"
    assert left.exists(), "it may be another host's, at work"
    hour_ago = time.time() - 3600
    os.utime(left, (hour_ago, hour_ago))
    pin = shards.branches["main"]
    shards.commit({"config.json": b"{}"})
    hub.close()
    offline = online | {"HF_HUB_OFFLINE": "1"}
    trained = finetune("train", recipe, "--run", tmp_path / "run", env=offline)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["base"]["revision"] == pin
    assert not left.exists()


@pytest.mark.slow
def test_one_flipped_byte_of_a_shard_is_refused(hub, online, shards, recipe) -> None:
    hub.fail("GET", SHARD, None, is_corrupt=True, skip=1)
    ((code, _, errors),) = in_turn(online, ("fetch", recipe))
    assert code == 1 and "a file is not what the Hub has" in errors


@pytest.mark.slow
def test_a_config_alone_is_fetched_for_random_weights_and_a_gguf_file_alone_for_itself(
    hub, online, shards, recipe_file, tiny_base, tiny_tokenizer, tmp_path
) -> None:
    from tests.model import gguf_files

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    file = gguf_files.write(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    hub.add("model", "tiny/files").commit({"q8/tiny.gguf": file.read_bytes(), "other.gguf": b"GGUF of no use"})
    drawn = recipe_file("drawn", base={"checkpoint": "tiny/shards", "random_weights": 1}, adapter=None)
    of_file = recipe_file("file", base={"checkpoint": "tiny/files/q8/tiny.gguf"})
    missing = recipe_file("missing", base={"checkpoint": "tiny/files/none.gguf"})
    done = in_turn(online, ("fetch", drawn), ("fetch", of_file), ("plan", missing), ("plan", of_file, "--json"))
    assert [code for code, *_ in done] == [0, 0, 1, 0], done
    assert not gets(hub) and not gets(hub, "other.gguf") and len(gets(hub, "tiny.gguf")) == 1
    assert "the repository has no file none.gguf\nhint: look at " in done[2][2]
    for _, said, _ in done[:2]:
        assert (Path(said.strip()) / "model.safetensors").is_file()
    base = json.loads(done[3][1])["base"]
    assert (base["kind"], base["digest"]) == ("gguf", None) and len(base["revision"]) == 40
