"""The acceptance of a GPU host runs at a tiny size anywhere: items, one JSON, one page, and a second call that goes on."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import forks

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"
ITEMS = ("limits", "kernels", "waits/full", "small/finetune", "small/bare", "small/bare-liger")


def accept(place: Path, *arguments: object) -> subprocess.CompletedProcess:
    paths = ["--out", place / "out", "--work", place / "work"]
    command = [sys.executable, SCRIPTS / "accept.py", *arguments, *paths, "--tiny"]
    return forks.run(list(map(str, command)), capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_every_kind_of_item_runs_once_and_ends_up_in_the_report_and_on_the_page(tmp_path):
    first = accept(tmp_path, *ITEMS[:-1], "--seconds", 250)
    assert first.returncode == 0, first.stdout + first.stderr + (tmp_path / "out/log.txt").read_text()[-4000:]
    again = accept(tmp_path, *ITEMS, "--seconds", 60)  # goes on with what is left, if it can
    assert "kernels" not in again.stdout and "6 of 6 items done" in again.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = {name: item["ok"] for name, item in report["items"].items()}
    assert {name for name, is_good in found.items() if is_good} >= {"limits/device", "kernels/all", "waits/full"}
    ours, bare = report["items"]["small/finetune"], report["items"]["small/bare"]
    assert ours["losses"][0] == pytest.approx(bare["losses"][0], rel=0.01)
    assert len(ours["step_seconds"]) == len(ours["await_seconds"]) == 12 and ours["saves"]
    page = (tmp_path / "out/page.md").read_text()
    for part in ("### Kernels", "### small", "### Saves", "| small: tokens/s over those of bare: at least 0.97 |"):
        assert part in page


@pytest.fixture
def report(monkeypatch):
    """The module that judges and shows."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import importlib

    return importlib.import_module("report")


def test_goals_are_judged_by_figures_of_the_same_types_and_what_was_not_measured_is_not(report):
    ours = {"ok": True, "tokens_per_second": 96.0, "forecast_bytes": 12, "reserved_bytes": 10, "alloc_retries": 0}
    ours |= {"await_seconds": [0.0, 0.2], "step_seconds": [1.0, 1.0], "is_bf16": False}
    items = {
        "small/finetune": ours,
        "small/finetune, bf16": ours | {"is_bf16": True, "tokens_per_second": 150.0, "await_seconds": [0.0, 0.0]},
        "small/bare": {"ok": True, "tokens_per_second": 100.0, "kind": "bare", "dtype": "float32"},
        "small/trainer": {"ok": True, "tokens_per_second": 100.0, "kind": "trainer", "dtype": "bfloat16"},
        "small/bare-liger": {"ok": True, "tokens_per_second": 200.0, "kind": "bare-liger", "dtype": "float32"},
        "exact/full": {"ok": False},
    }
    judged = {goal.text.partition(":")[0] + goal.text.partition(":")[2][:30]: goal for goal in report.goals(items)}
    found = {goal.text: (goal.found, goal.is_reached) for goal in judged.values()}
    assert found["all of `exact`"] == ("0 of 1; not exact/full", False)
    assert found["all of `kernels`"] == ("0 of 0", None)
    assert found["forecast of memory over what was reserved: 0.9 to 1.3"][1] is True
    assert found["updates that wait for a copy: under 5% of a step"][1] is False
    assert found["small: tokens/s over those of bare: at least 0.97"] == ("0.960", False)
    assert found["small: tokens/s over those of trainer: at least 1.0"] == ("1.500", True)
    assert found["small: tokens/s over those of bare-liger"] == ("0.480", None)


def test_a_slim_wheel_keeps_one_version_of_cuda_and_says_what_it_holds(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import importlib

    wheel, kept = (
        tmp_path / "bitsandbytes-1-py3-none-any.whl",
        ("b/__init__.py", "b/libbitsandbytes_cuda130.so", "b/cpu.so"),
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, "b/libbitsandbytes_cuda118.so", "b/libbitsandbytes_rocm63.so", "b-1.dist-info/RECORD"):
            archive.writestr(name, "content")
    importlib.import_module("slim").slim(wheel, "cuda130")
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == sorted((*kept, "b-1.dist-info/RECORD"))
        lines = archive.read("b-1.dist-info/RECORD").decode().splitlines()
    digest = "sha256=7XACtDnprIRfIjV9giusFERzD722AW0-yUMil7nsn3M"  # echo -n content | openssl dgst -sha256 -binary | basenc --base64url
    assert {f"{name},{digest},7" for name in kept} | {"b-1.dist-info/RECORD,,"} == set(lines)


def test_a_command_that_outlives_its_time_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import importlib

    host = importlib.import_module("host")
    here = host.Host(tmp_path / "out", tmp_path / "work", 600, True)
    pids = tmp_path / "pids"
    command = ["sh", "-c", f"sleep 300 & echo $! > {pids}; wait"]
    monkeypatch.setattr(host, "LEAST_SECONDS", 0)
    assert here.run(command, 0.5).code == 124
    status = Path(f"/proc/{pids.read_text().strip()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()
    here._ends -= 600
    with pytest.raises(host.OutOfTime):
        here.run(command, 5)
