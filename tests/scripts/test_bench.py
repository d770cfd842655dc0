"""The benchmark's short form: every part runs, with every contestant and every figure. How fast anything is, no test asks."""

import json
import sys
from pathlib import Path

import pytest

from tests import forks

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "checkpoints.py"
SAVES = {
    "finetune",
    "torch.save",
    "safetensors + fsync",
    "accelerate save_state",
    "DCP async_save",
    "DCP async_save, cached stager",
    "DCP async_save, cached stager, staged beside",
}
MEMCPY = "memcpy into warm buffers (the limit)"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    work, file = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("report") / "bench.json"
    short = ["--tiny", "--rounds", "1", "--cycles", "1", "--saves", "3", "--threads", "1"]
    parts, shown = {}, ""
    # The ranks of part f are forks: of a process that has trained before, they would be one rank each.
    for only in ("a,b,c,d,e", "f"):
        command = [sys.executable, SCRIPT, "--work", work, "--json", file, "--only", only, *short]
        result = forks.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr[-2000:]
        assert not list(work.iterdir()), "what was measured is removed"
        found, shown = json.loads(file.read_bytes()), shown + result.stdout
        parts |= found["parts"]
    return found | {"parts": parts, "shown": shown}


def contestants(report: dict, part: str) -> list[set[str]]:
    """The contestants of each quantity of a part, in the order in which they are shown."""
    return [set(quantity["contestants"]) for quantity in report["parts"][part]["quantities"]]


def test_every_way_to_save_is_measured_on_a_full_and_on_a_lora_state(report):
    for part in ("a, full", "a, LoRA"):
        blocked, ended, lost = contestants(report, part)
        assert blocked == lost == SAVES | {MEMCPY}
        assert ended == SAVES


def test_the_overhead_stands_beside_a_writer_process_and_the_noise(report):
    for threads in (1, 2):
        overhead, extra, cpu = contestants(report, f"b, full, {threads} threads")
        assert overhead == extra == {"finetune", "writer process (floor)", "quiet, the second (noise)"}
        assert cpu == {"finetune", "finetune, its writer's thread", "writer process (floor)"}
        assert contestants(report, f"b, LoRA, {threads} threads") == [{"finetune", "quiet, the second (noise)"}] * 2


def test_durability_stands_beside_a_raw_write(report):
    assert contestants(report, "c")[0] == {"finetune", "raw write + fsync beside training"}


def test_resuming_is_broken_down(report):
    resume, speed, seek = contestants(report, "d")
    assert len(resume) == 5 and "finetune" in resume & speed & seek


def test_size_stands_beside_the_trainers(report):
    sizes, shares = (quantity["contestants"] for quantity in report["parts"]["e"]["quantities"])
    assert sum("transformers" in name for name in sizes) == 2 and len(shares) == 4
    assert all(sizes[name]["median"] > 0 for name in sizes)


def test_every_figure_has_median_p99_and_count(report):
    for part in report["parts"].values():
        for quantity in part["quantities"]:
            for figures in quantity["contestants"].values():
                assert figures["count"] == len(figures["samples"]) > 0
                assert min(figures["samples"]) <= figures["median"] <= max(figures["samples"])
                assert figures["p99"] >= figures["median"]


def test_every_goal_is_judged_in_the_text_and_in_the_file(report):
    goals = [goal for part in report["parts"].values() for goal in part["goals"]]
    shown = report["shown"].partition("== goals")[2]
    assert all(goal["name"] in shown for goal in goals)
    assert {part for part in report["parts"] if report["parts"][part]["goals"]} == set(report["parts"])


def test_long_and_short_runs_are_measured_side_by_side():
    command = [sys.executable, SCRIPT.with_name("history.py"), "--kept", "3", "--steps", "2000", "--rounds", "1"]
    result = forks.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line.split("  ")[0] for line in result.stdout.splitlines() if line.endswith(" x")] == [
        "keep rules of a save, manifests known",
        "the same, all manifests read (as every save did)",
        "columns of a save",
        "files in rows/",
        "scan of the journal",
        "all of it read (as replay, bisect and log did)",
        "memory of it: scan",
        "memory of it: all records",
    ]
