"""The comparison's arithmetic, the rows that all contestants share, and that every part runs; how fast anything is, no test asks."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import forks

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """The scripts' modules by name, as they import each other."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def run(contestant: str, step_seconds: float, turn: int = 0, **figures: object) -> dict:
    """A run of five steps of 1,000 tokens, whose first two steps are slow."""
    ends = [10.0, 20.0, *(20.0 + step_seconds * number for number in (1, 2, 3))]
    plain = {"peak_bytes": 4000, "staged_bytes": 0, "started": 4.0, "losses": [3.0, 2.0], "malloc": "tuned"}
    shape = {"cell": "full-512-bf16", "contestant": contestant, "round": turn, "ends": ends, "tokens": [1000] * 5}
    return plain | shape | figures


def test_the_first_two_steps_are_not_counted(bench):
    assert bench("comparison").tokens_per_second(run("trainer", 2.0)) == pytest.approx(500)


def test_the_start_counts_from_the_process_to_the_end_of_its_first_step(bench):
    assert bench("comparison").first_step_seconds(run("trainer", 2.0)) == pytest.approx(6)


def test_what_ours_stages_saves_in_is_no_part_of_its_peak(bench):
    assert bench("comparison").peak_bytes(run("finetune", 2.0, staged_bytes=1500)) == 2500


def test_ratios_are_taken_within_a_round(bench):
    comparison = bench("comparison")
    ours = [run("finetune", 1.0, 0), run("finetune", 4.0, 1), run("finetune", 1.0, 2)]
    others = [run("trainer", 2.0, 0), run("trainer", 8.0, 1)]
    assert comparison.ratios(comparison.tokens_per_second, ours, others) == pytest.approx([2.0, 2.0])


def test_ours_is_held_against_the_fastest_bare_loop(bench):
    comparison = bench("comparison")
    runs = [run("finetune", 2.0), run("bare-padded", 4.0), run("bare-chunked", 1.0), run("sft-padded", 0.5)]
    contestants = comparison.by_contestant(runs, ("full-512-bf16", "tuned"))
    assert comparison.fastest_bare(contestants) == "bare-chunked"
    goal, found = comparison.goals_of(contestants, bench("cells").parse("full-512-bf16"))[0]
    assert found == [goal.value] == pytest.approx([0.5]) and goal.limit == 0.97 and not goal.is_reached


def test_a_goal_without_its_other_side_is_not_judged(bench):
    contestants = {"finetune": [run("finetune", 2.0)], "trainer": [run("trainer", 4.0)]}
    names = [goal.name for goal, _ in bench("comparison").goals_of(contestants, bench("cells").parse("full-512-fp32"))]
    assert names == ["tokens/s, ours / Trainer", "peak memory, ours / Trainer"]


def test_losses_that_differ_or_are_not_numbers_are_named(bench):
    comparison = bench("comparison")
    right, close = run("bare-padded", 1.0), run("finetune", 1.0, losses=[3.001, 2.0])
    assert comparison.disagreeing([right, close]) == []
    for wrong in ([3.0, 2.1], [math.nan, 2.0]):
        lines = comparison.disagreeing([right, close, run("trainer", 1.0, losses=wrong)])
        assert len(lines) == 1 and "losses of trainer differ" in lines[0]


def test_mfu_counts_three_products_for_all_weights_and_two_for_frozen_ones(bench):
    cells = bench("cells")
    assert cells.parse("full-512-bf16").flops_of_token == 6 * 134_515_008
    assert cells.parse("lora-512-bf16").flops_of_token == 4 * 134_515_008 + 6 * 4_884_480
    at_peak = run("finetune", 1000 * 6 * 134_515_008 / 1e9 / 800)
    assert bench("comparison").mfu(cells.parse("full-512-bf16"), at_peak, 800) == pytest.approx(1)


def test_an_unknown_cell_is_refused_with_the_known_ones(bench):
    with pytest.raises(ValueError, match="no cell is called full-512; there are full-512-bf16, "):
        bench("cells").parse("full-512")


@pytest.mark.parametrize("max_length", [512, 1024])
def test_updates_are_of_one_size_and_fit_into_equally_many_sequences(bench, tiny_tokenizer, max_length):
    corpus, pack = bench("corpus"), importlib.import_module("finetune.data.pack")
    steps = corpus.steps(tiny_tokenizer, 5, max_length)
    assert steps == corpus.steps(tiny_tokenizer, 5, max_length)
    for texts in steps:
        lengths = [len(tiny_tokenizer(text)["input_ids"]) + 1 for text in texts]
        assert 900 <= sum(lengths) <= 1024 and max(lengths) <= max_length
        assert len(pack.packed(lengths, max_length)) == 1024 // max_length


def test_ours_draws_the_rows_that_the_others_read(bench, tiny_base, tiny_tokenizer, tmp_path):
    cells = bench("cells")
    prepared = cells.prepare(cells.parse("full-512-fp32"), 3, tiny_base, tmp_path / "cell")
    rows = [json.loads(line)["text"] for line in (tmp_path / "cell/train.jsonl").read_text().splitlines()]
    job = bench("contenders.job").Job(**json.loads(prepared.job.read_bytes()))
    order = bench("cells").Order(cells.SEED, 4, (len(rows),))
    for step, examples in enumerate(job.examples(), start=1):
        ours = [
            [*tiny_tokenizer(rows[row])["input_ids"], tiny_tokenizer.eos_token_id] for row in order.examples_of(step)
        ]
        assert len(examples) == 4
        assert all(np.array_equal(example, row) for example, row in zip(examples, ours, strict=True))


@pytest.fixture
def throughput(bench):
    """A function that runs the script in a fork. Its contestants are forks too: their memory is tuned as its own is."""
    env = os.environ | bench("processes").MALLOC["tuned"]

    def throughput(*arguments: object, starts: bool = False) -> subprocess.CompletedProcess:
        command = [sys.executable, BENCH / "throughput.py", "--tiny", "--threads", "1", "--rounds", "1", *arguments]
        run, own = (subprocess.run, os.environ) if starts else (forks.run, env)
        result = run(list(map(str, command)), capture_output=True, text=True, timeout=290, env=own)
        assert result.returncode == 0, f"{result.stdout[-1000:]}{result.stderr[-2000:]}"
        return result

    return throughput


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["full-512-fp32", "lora-1024-bf16"])
def test_all_contestants_compute_the_losses_of_the_plain_loop(cell, throughput, tmp_path):
    only = ["bare-padded", "bare-packed", "bare-chunked", "bare-per-row", "trainer", "finetune"]
    if importlib.util.find_spec("trl"):
        only += ["sft-padded", "sft-packed"]
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    throughput("--check", "--cells", cell, "--only", ",".join(only), "--json", report, "--work", tmp_path)
    runs = json.loads(report.read_bytes())["runs"]
    assert {run["contestant"] for run in runs} == set(only) and len(runs) == len(only)
    assert all(len(run["losses"]) == 20 and run["peak_bytes"] > 0 for run in runs)
    throughput("--write", page, "--from", report)
    assert page.read_text().count("| Trainer |") == 2  # how it is set, and its figures


@pytest.mark.slow
def test_the_parts_beside_the_table_are_measured_and_written(throughput, tmp_path):
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    throughput("--part", "overhead,update,profile", "--json", report, "--work", tmp_path)
    parts = json.loads(report.read_bytes())["parts"]
    assert set(parts) >= {"overhead", "profile, finetune", "profile, bare-per-row"}
    assert sum(operator["share"] for operator in parts["profile, finetune"]) == pytest.approx(1)
    throughput("--write", page, "--from", report)
    assert "## Overhead" in page.read_text() and "| operator | share |" in page.read_text()


@pytest.mark.slow
def test_start_and_resume_are_measured_at_every_position(throughput, tmp_path):
    report = tmp_path / "report.json"
    throughput("--part", "start", "--json", report, "--work", tmp_path, starts=True)  # starting is what is measured
    resume = json.loads(report.read_bytes())["parts"]["resume"]
    names = {"at step 10", "at step 2,000"}
    assert [set(quantity["contestants"]) for quantity in resume["quantities"]] == [names, names]


@pytest.mark.slow
def test_the_bench_of_padding_gives_every_contestant_the_same_rows(bench):
    padding = bench("padding")
    lengths = padding.lengths_of_rows()
    for slots in padding.steps_of(lengths).values():
        assert sorted(row for step in slots for slot in step for row in slot) == list(range(len(lengths)))
    found = padding.steps_of(lengths)
    assert padding.padding_share(found["padded"], lengths, "padded") <= 0.1
    assert padding.padding_share(found["random"], lengths, "random") > 0.5
