"""A base and data by Hub id, from a Hub on the loopback with the real clients: pinned, moved, refused, cut short, offline.

Commands run in processes of their own, since `huggingface_hub` reads the address of its Hub once, when it is imported.
"""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from finetune.store.run import journal
from tests import forks
from tests.hub.client import in_turn

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of nothing


def plan_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pins(plan: dict) -> list[str]:
    return [plan["base"]["revision"], *(source["revision"] for source in plan["train"] + plan["holdout"])]


def parquet(lines: bytes) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines.splitlines()]), file)
    return file.getvalue()


@pytest.mark.slow
def test_a_branch_of_a_base_and_a_tag_of_a_data_set_are_pinned_to_their_commits(
    hub, online, base, rows, chat_data, recipe_file, finetune
) -> None:
    rows.tags["v1"] = rows.branches["main"]
    rows.commit({"train.jsonl": b'{"text": "of no use to whoever asks for v1"}\n'})
    held_out = hub.add("dataset", "tiny/held-out")
    held_out.commit({"data/test-00000-of-00001.parquet": parquet((chat_data / "holdout.jsonl").read_bytes())})
    data = {
        "train": [{"dataset": "tiny/rows", "revision": "v1"}],
        "holdout": [{"dataset": "tiny/held-out", "split": "test"}],
    }
    recipe = recipe_file(base={"checkpoint": "tiny/base", "revision": "next"}, data=data)
    plan = plan_of(finetune("plan", recipe, "--json", env=online))
    assert pins(plan) == [base.branches["next"], rows.tags["v1"], held_out.branches["main"]]
    assert (plan["rows"], plan["holdout_rows"]) == (40, 8)
    assert not hub.seen("GET", r"\.safetensors$"), "a plan downloads nothing heavy"


@pytest.mark.slow
def test_what_cannot_be_had_from_the_hub_is_one_clear_error(hub, online, base, rows, recipe_file) -> None:
    small = {path: file.content for path, file in base.at("main").files.items() if path != "model.safetensors"}
    gated = hub.add("model", "tiny/gated", is_gated=True).commit(small)
    hub.add("model", "tiny/pickled").commit(small | {"pytorch_model.bin": b"a pickle"})
    hub.add("model", "tiny/private", is_private=True, readers={"hf_of_others"}).commit(small)
    hub.add("dataset", "tiny/gated-rows", is_gated=True).commit({"train.jsonl": b'{"text": "a"}\n'})
    ask = "hint: ask for access at its page, then set HF_TOKEN"
    absent = "is not on the Hub, or private\nhint: check the name; for a private one set HF_TOKEN"
    unknown = "the repository has no such revision\nhint: name a branch, a tag or a commit"
    pickled = "has no safetensors weights\nhint: convert it: load it in transformers once and call save_pretrained"
    no_data = "no such data set on the Hub\nhint: check its name; a private or gated one needs `hf auth login`"
    no_split = """cannot be loaded: Unknown split "gone". Should be one of ['train']
hint: check `name`, `split` and `revision` in the recipe"""
    moved = "hint: correct `revision`, or remove it for the main branch"
    for name, status in (("tiny/unpaid", 402), ("tiny/down", 503)):
        hub.add("model", name).commit(small)
        hub.add("dataset", name).commit({"train.jsonl": b'{"text": "a"}\n'})
        hub.fail("GET|HEAD", f"/{name}", status, times=1000)
    fault = "a fault that the test ordered"
    unpaid = f"the Hub refuses: {fault} (402, payment required)\nhint: the owner's plan or storage is used up: "
    unpaid += "look at its billing page on the Hub"
    down = f"the Hub is out of order: {fault} (503)\nhint: try again later: the fault is the Hub's or a proxy's"
    cases = [
        ("plan", "tiny/none", {}, f"tiny/none: {absent}"),
        ("plan", "tiny/private", {}, f"tiny/private: {absent}"),
        ("plan", "tiny/base@gone", {}, f"tiny/base@gone: {unknown}"),
        ("plan", f"tiny/base@{COMMIT}", {}, f"tiny/base@{COMMIT}: {unknown}"),
        ("plan", "tiny/gated", {}, f"tiny/gated@{gated}: is gated\n{ask}"),
        ("plan", "tiny/pickled", {}, f"tiny/pickled: {pickled}"),
        ("fetch", "tiny/pickled", {}, f"tiny/pickled: {pickled}"),
        ("plan", "tiny/unpaid", {}, f"tiny/unpaid: {unpaid}"),
        ("plan", "tiny/down", {}, f"tiny/down: {down}"),
        ("plan", "tiny/base", {"dataset": "tiny/unpaid"}, f"tiny/unpaid: {unpaid}"),
        ("plan", "tiny/base", {"dataset": "tiny/down"}, f"tiny/down: {down}"),
        ("plan", "tiny/base", {"dataset": "tiny/none"}, f"tiny/none: {no_data}"),
        ("plan", "tiny/base", {"dataset": "tiny/gated-rows"}, f"tiny/gated-rows: is gated\n{ask}"),
        (
            "plan",
            "tiny/base",
            {"dataset": "tiny/rows", "revision": "gone"},
            f"tiny/rows: has no revision `gone`\n{moved}",
        ),
        (
            "plan",
            "tiny/base",
            {"dataset": "tiny/rows", "revision": COMMIT},
            f"tiny/rows: has no revision `{COMMIT}`\n{moved}",
        ),
        ("plan", "tiny/base", {"dataset": "tiny/rows", "split": "gone"}, f"tiny/rows: {no_split}"),
    ]
    commands = []
    for number, (command, checkpoint, source, _) in enumerate(cases):
        data = {"data": {"train": [source], "holdout": 4}} if source else {}
        commands.append((command, recipe_file(f"case-{number}", base={"checkpoint": checkpoint}, **data)))
    results = in_turn(online, *commands)
    assert [(code, said) for code, _, said in results] == [(1, f"{said}\n") for *_, said in cases]


@pytest.mark.slow
def test_what_was_fetched_trains_without_a_network_on_the_same_pins_after_a_cut_download(
    hub, online, base, rows, recipe_file, finetune, tmp_path
) -> None:
    old = [base.branches["next"], rows.branches["main"]]
    rows.tags["v1"] = old[1]
    new_rows = rows.commit({"train.jsonl": b"".join(rows.at("v1").files["train.jsonl"].content.splitlines(True)[:8])})
    data = {"train": [{"dataset": "tiny/rows", "revision": "v1"}], "holdout": 4}
    recipe = recipe_file(base={"checkpoint": "tiny/base", "revision": "next"}, data=data)
    newer = recipe_file(
        "newer", data={"train": [{"dataset": "tiny/rows"}], "holdout": 4}, base={"checkpoint": "tiny/base"}
    )

    hub.cut("GET", r"/model\.safetensors$", after_bytes=1000)
    hub.cut("GET", r"/train\.jsonl$", after_bytes=10)
    fetched = in_turn(online, ("fetch", recipe), ("fetch", newer))
    assert [code for code, *_ in fetched] == [0, 0], fetched
    weights = Path(fetched[0][1].strip()) / "model.safetensors"
    assert weights.read_bytes() == base.at("next").files["model.safetensors"].content
    assert not [fault for fault in hub.faults if fault.times], "both downloads were cut"
    assert not hub.seen("GET", r"onnx|consolidated")

    hub.close()
    offline = in_turn(online | {"HF_HUB_OFFLINE": "1"}, ("plan", recipe, "--json"), ("plan", newer, "--json"))
    assert [code for code, *_ in offline] == [0, 0], offline
    plans = [json.loads(printed) for _, printed, _ in offline]
    assert [pins(plan) for plan in plans] == [old, [base.branches["main"], new_rows]]
    assert [plan["rows"] for plan in plans] == [36, 4]
    trained = finetune("train", recipe, "--run", tmp_path / "run", "--set", "train.steps=2", env=online)
    assert trained.returncode == 0, trained.stderr
    assert pins(json.loads((tmp_path / "run" / "plan.json").read_text())) == old


@pytest.mark.slow
def test_a_run_resumes_on_its_pins_when_branches_have_moved(
    hub, online, base, rows, recipe_file, finetune, tmp_path
) -> None:
    data = {"train": [{"dataset": "tiny/rows"}], "holdout": 4}
    train = {"steps": 60, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    recipe, run = recipe_file(base={"checkpoint": "tiny/base"}, data=data, train=train), tmp_path / "run"
    old = [base.branches["main"], rows.branches["main"]]
    command = [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(run)]
    process = forks.Popen(command, env=online, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while max(journal.steps(journal.read(run)), default=0) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143

    base.commit({"config.json": b"{}", "model.safetensors": b"another model"})
    rows.commit({"train.jsonl": b'{"text": "other rows"}\n'})
    resumed = finetune("train", recipe, "--run", run, env=online)
    assert resumed.returncode == 0, resumed.stderr
    assert pins(json.loads((run / "plan.json").read_text())) == old
    assert sorted(journal.steps(journal.read(run))) == list(range(1, 61))
