"""Downloads that do not arrive whole, and disks that cannot keep them: by HTTP, and by Xet from a folder in place of its server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_xet
import pytest

from tests import forks

WEIGHTS = "model.safetensors"
CHUNKS = "xet/xorbs/xorbs"
NOBODY = 4321


@pytest.fixture
def by_xet(hub, online, base, tmp_path) -> dict[str, str]:
    """The environment of a user to whom the weights of `tiny/base` come by Xet."""
    hub.xet_directory = tmp_path / "cas"
    hub.xet_directory.mkdir()
    file = base.at("main").files[WEIGHTS]
    with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{hub.xet_directory}") as upload:
        uploaded = upload.start_upload_bytes(file.content, hf_xet.COMPUTE_SHA256)
    hub.xet_hashes = {file.sha256: uploaded.result().xet_info.hash}
    return online | {"HF_HUB_DISABLE_XET": "0"}


@pytest.fixture
def recipe(recipe_file, base, rows) -> Path:
    return recipe_file(base={"checkpoint": "tiny/base"}, data={"train": [{"dataset": "tiny/rows"}], "holdout": 4})


def fetch(recipe: Path, env: dict[str, str], *before: str) -> subprocess.CompletedProcess:
    command = [*before, sys.executable, "-m", "finetune", "fetch", str(recipe)]
    return forks.Either.run(command, env=env, capture_output=True, text=True, timeout=100)


def refusal(done: subprocess.CompletedProcess) -> tuple[str, str]:
    """The one error at the end of stderr and its hint; the clients' own warnings may come before."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message, hint = done.stderr.strip().splitlines()[-2:]
    return message, hint


def is_as_the_hub_has_it(done: subprocess.CompletedProcess, base) -> bool:
    assert done.returncode == 0, done.stderr
    return (Path(done.stdout.strip()) / WEIGHTS).read_bytes() == base.at("main").files[WEIGHTS].content


@pytest.mark.slow
def test_weights_come_by_xet_and_are_those_of_the_commit(hub, by_xet, base, recipe) -> None:
    done = fetch(recipe, by_xet)
    assert is_as_the_hub_has_it(done, base) and not hub.seen("GET", WEIGHTS) and hub.seen("GET", "xet-read-token")
    assert "adapter_config" not in done.stderr, "that it is no adapter is nothing to warn of"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", "xet"])
def test_a_bit_that_flips_on_the_way_is_refused_and_mended_as_hinted(way, hub, online, base, recipe, request) -> None:
    env = online if way == "http" else request.getfixturevalue("by_xet")
    if way == "http":
        hub.fail("GET", WEIGHTS, None, is_corrupt=True)
    else:
        (chunks,) = [file for file in (hub.xet_directory / CHUNKS).iterdir() if file.suffix != ".tagset"]
        sound = chunks.read_bytes()
        middle = len(sound) // 3
        chunks.write_bytes(sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :])
    for _ in range(2):
        message, hint = refusal(fetch(recipe, env))
        assert message.endswith(": a file is not what the Hub has: it was damaged on its way, or on this disk")
    if way == "xet":
        chunks.write_bytes(sound)
    os.remove(hint.removeprefix("hint: remove ").partition(",")[0])
    assert is_as_the_hub_has_it(fetch(recipe, env), base)


@pytest.mark.slow
def test_a_bit_that_flips_on_the_disk_is_refused(online, base, recipe) -> None:
    weights = (Path(fetch(recipe, online).stdout.strip()) / WEIGHTS).resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message, hint = refusal(fetch(recipe, online))
    assert "a file is not what the Hub has" in message and str(weights) in hint


@pytest.mark.slow
def test_a_row_that_changes_on_the_way_is_refused_and_mended_as_hinted(hub, online, base, recipe_file) -> None:
    rows = "\n".join(["text", *(f"the words of row {number}" for number in range(40)), "the last one"])
    hub.add("dataset", "tiny/texts").commit({"train.csv": rows.encode()})
    data = {"train": [{"dataset": "tiny/texts"}], "holdout": 4}
    recipe = recipe_file(base={"checkpoint": "tiny/base"}, data=data, task={"name": "text", "max_length": 64})
    hub.fail("GET", "train.csv", None, is_corrupt=True)
    for _ in range(2):
        message, hint = refusal(fetch(recipe, online))
        assert message.startswith("tiny/texts@") and "a file is not what the Hub has" in message
    downloaded, _, made_of_it = hint.removeprefix("hint: remove ").partition(",")[0].partition(" and ")
    assert Path(downloaded).read_text().endswith("the last ond")
    os.remove(downloaded)
    shutil.rmtree(made_of_it)
    assert is_as_the_hub_has_it(fetch(recipe, online), base)


@pytest.mark.slow
def test_a_xet_store_without_the_object_is_one_clear_error(hub, by_xet, base, recipe) -> None:
    place, hub.xet_directory = hub.xet_directory, Path("/proc/nothing")
    assert "the Hub cannot be reached: " in refusal(fetch(recipe, by_xet))[0]
    hub.xet_directory = place
    assert is_as_the_hub_has_it(fetch(recipe, by_xet), base)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("way", ["http", "xet"])
def test_a_full_disk_is_told_with_its_name(way, hub, online, base, recipe, request) -> None:
    env = online if way == "http" else request.getfixturevalue("by_xet")
    home = Path(env["HF_HOME"])
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", home], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        message, hint = refusal(fetch(recipe, env))
        assert message == f"HF_HOME={home}: downloads cannot be kept: no space left on device"
        assert hint.startswith("hint: free some space on this disk, or use another one")
        subprocess.run(["mount", "-o", "remount,size=9m", home], check=True)
        assert is_as_the_hub_has_it(fetch(recipe, env), base)
    finally:
        subprocess.run(["umount", "--lazy", home], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="gives a folder away")
@pytest.mark.parametrize("folder", ["", "hub", "datasets"])
def test_a_cache_of_another_user_is_told_with_its_name(folder, online, recipe) -> None:
    home = Path(online["HF_HOME"])
    (home / folder).mkdir(parents=True)
    os.chown(home / folder, NOBODY, NOBODY)
    as_user = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")  # root without its capabilities
    if subprocess.run([*as_user, "true"]).returncode:
        pytest.skip("root cannot give up its capabilities here")
    message, hint = refusal(fetch(recipe, online, *as_user))
    assert message.startswith(f"HF_HOME={home}: downloads cannot be kept: permission denied: {home / folder}"), message
    assert hint == "hint: check owner and permissions of the directory, or use another one"
