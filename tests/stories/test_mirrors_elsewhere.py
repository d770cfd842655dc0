"""Runs that are mirrored to an object store and to the Hub, with their real clients against servers on the loopback."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from finetune.errors import MirrorError
from finetune.store.mirror.opening import opened
from tests.hub import Hub
from tests.hub.client import environment, in_turn
from tests.hub.writes import User
from tests.stories.same_run import assert_same_run

TOKEN = "hf_" + "w" * 34
KEY = "never-written-down"
COMMITS = {"every": "2 steps", "save_best": False}

pytestmark = pytest.mark.slow


@pytest.fixture
def store():
    """An object store in memory, and the environment of its user."""
    pytest.importorskip("s3fs", reason="pip install 'finetune[s3]'")
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ACCESS_KEY_ID": "AKIA" + "TEST" * 4,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "NO_PROXY": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="runs")
        yield env
    server.stop()


@pytest.fixture
def google():
    """The same of Google's store, as its emulator has it."""
    pytest.importorskip("gcsfs", reason="pip install 'finetune[gs]'")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="runs")
    server.start()
    # The client asks what kind of bucket it is, which the emulator cannot tell.
    about = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_PROXY": "127.0.0.1"}
    yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", **about}
    server.stop()


@pytest.fixture
def place(request, tmp_path):
    """The address of a mirror, and the environment of who uses it."""
    if request.param == "s3":
        yield "s3://runs/of/{run}", {**os.environ, **request.getfixturevalue("store")}
    elif request.param == "gs":
        yield "gs://runs/of/{run}", {**os.environ, **request.getfixturevalue("google")}
    else:
        with Hub(seconds=280) as hub:
            hub.users[TOKEN] = User("owner")
            yield "hf://owner/{run}/mirror", environment(hub, tmp_path, HF_TOKEN=TOKEN)


@pytest.mark.parametrize("place", ["s3", "gs", "hf"], indirect=True)
def test_a_run_goes_on_elsewhere_from_its_mirror(place, recipe_file, train, tmp_path) -> None:
    to, env = place
    # The Hub is also asked for nothing else: the base is a folder.
    sections = {"checkpoint": COMMITS, "evaluate": {"every": "4 steps"}}
    alone = train(recipe_file("alone", **sections), tmp_path / "alone")
    recipe = recipe_file(mirror=to, **sections)
    run, other = tmp_path / "runs/a", tmp_path / "other/a"
    ((code, _, said),) = in_turn(env, ("train", recipe, "--run", run, "--until", 4))
    assert code == 0, said
    assert "mirror: mirrored step 4\n" in said
    shutil.rmtree(run)
    here = to.replace("{run}", "a")
    results = in_turn(
        env,
        ("train", recipe, "--run", other),
        ("mirror", other, "--json"),
        ("log", here, "--json"),
        ("verify", f"{here}@10"),
        ("show", f"{here}@best", "--json"),
    )
    assert [code for code, _, _ in results] == [0] * 5, results
    assert f"restored step 4 from {here}\n" in results[0][2]
    assert_same_run(alone, other)
    assert json.loads(results[1][1]) == {"mirror": here, "sent": [], "steps": [8, 10], "missing": []}
    assert [row["step"] for row in json.loads(results[2][1])["checkpoints"]] == [8, 10]
    assert json.loads(results[4][1])["step"] == 10
    for path in [*other.rglob("*"), *Path(env.get("FINETUNE_CACHE", other)).rglob("*")]:
        assert not path.is_file() or not {TOKEN.encode(), KEY.encode()} & {*path.read_bytes().split()}, path


def test_objects_of_a_store_are_put_listed_and_removed(store) -> None:
    objects = opened("s3://runs/a")
    assert objects.sizes("blobs") == {}
    assert objects.read("mirror.json") is None
    objects.put("blobs/aa/one.bin", b"x" * 3000)
    objects.put("mirror.json", b"{}")
    assert objects.sizes("blobs") == {"blobs/aa/one.bin": 3000}
    assert objects.read("mirror.json") == b"{}"
    objects.remove(["blobs/aa/one.bin", "blobs/never.bin"])
    assert opened("s3://runs/a").sizes("blobs") == {}


def test_what_the_store_refuses_is_said_without_the_key(store, monkeypatch) -> None:
    with pytest.raises(MirrorError, match="there is no such bucket\nhint: make the bucket first"):
        opened("s3://another-bucket/a").put("mirror.json", b"{}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MirrorError, match="the mirror does not answer as it should: ") as caught:
        opened("s3://runs/a").read("mirror.json")
    assert "set AWS_ACCESS_KEY_ID" in caught.value.hint
    assert KEY not in str(caught.value)
