"""Sweeps with real processes: trained, halved, killed, continued, and shared among workers."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.compare.sweep import directory
from finetune.store.run import journal
from tests import forks
from tests.conftest import copied
from tests.stories.same_run import assert_same_run

SHORT = {"steps": 8, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
EVALUATED = {"evaluate": {"every": "2 steps"}, "checkpoint": {"every": "2 steps", "keep": {"best": 1}}}
RATES = "--set=optimizer.learning_rate=[1e-4, 1e-3, 1e-2, 0.1]"


def answer(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    return forks.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def last_step(run: Path) -> int:
    return max(journal.steps(journal.read(run)), default=0)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, tiny_sections: dict) -> tuple[Path, Path, dict]:
    """Recipe, sweep and answer of a halving over four learning rates, by two workers."""
    from tests.conftest import finetune

    place = tmp_path_factory.mktemp("sweeps")
    recipe = place / "tiny.yaml"
    adapter = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
    recipe.write_text(json.dumps({**tiny_sections, "adapter": adapter, "train": SHORT, **EVALUATED}))
    options = (RATES, "--halving", 2, "--rungs", "2,4", "--workers", 2, "--sweep", place / "sweep", "--json")
    return recipe, place / "sweep", answer(finetune("sweep", recipe, *options))


@pytest.mark.slow
def test_halving_trains_the_best_further_and_tells_what_became_of_the_others(halved) -> None:
    _, sweep, found = halved
    assert [trial["state"] for trial in found["trials"]] == ["finished", "stopped", "stopped", "stopped"]
    assert [trial["step"] for trial in found["trials"]] == [8, 4, 2, 2]
    assert found["best"] == found["trials"][0]["ref"]
    losses = [trial["metrics"]["loss"] for trial in found["trials"]]
    assert losses[2] < losses[3]
    assert json.loads((sweep / "table.json").read_bytes()) == found
    assert found["leaders"] == [], "one trial alone came to the end"
    assert b"trials/000" in (sweep / "report.html").read_bytes()
    trained = sum(last_step(sweep / "trials" / f"{number:03}") for number in range(4))
    assert trained == found["steps"] == 4 * 2 + 2 * 2 + 1 * 4
    assert sum(trial["tokens"] for trial in found["trials"]) == pytest.approx(found["tokens"], rel=0.05)


@pytest.mark.slow
def test_a_run_that_rungs_paused_equals_one_that_was_never_paused(halved, train, tmp_path: Path) -> None:
    recipe, sweep, found = halved
    best = Path(found["best"].partition("@")[0])
    rate = found["trials"][0]["settings"]["optimizer.learning_rate"]
    whole = train(recipe, tmp_path / best.name, f"optimizer.learning_rate={rate}")
    assert_same_run(whole, best)
    started = [record for record in journal.read(best) if record.get("event") == "started"]
    assert [record["step"] for record in started] == [0, 2, 4]


@pytest.mark.slow
def test_the_same_command_continues_a_sweep_and_another_is_refused_with_the_differences(halved, finetune) -> None:
    recipe, sweep, found = halved
    before = (sweep / "trials/000/journal.jsonl").read_bytes()
    options = (RATES, "--halving", 2, "--rungs", "2,4", "--sweep", sweep, "--json")
    assert answer(finetune("sweep", recipe, *options)) == found
    assert answer(finetune("sweep", sweep, "--json")) == found
    assert (sweep / "trials/000/journal.jsonl").read_bytes() == before
    other = finetune("sweep", recipe, "--set=train.seed=[1, 2]", "--set=train.steps=6", "--sweep", sweep)
    assert other.returncode == 1
    for line in (
        "is a sweep of something else",
        "  halving: {'factor': 2, 'rungs': [2, 4]} -> None",
        "  set.optimizer.learning_rate: [0.0001, 0.001, 0.01, 0.1] -> None",
        "  set.train.steps: None -> [6]",
        "  trials: 4 -> 2",
        "hint: name another directory with --sweep",
    ):
        assert line in other.stderr
    usage = finetune("sweep", sweep, "--set=train.seed=[1, 2]")
    assert usage.returncode == 2
    assert "has its settings" in usage.stderr


@pytest.mark.slow
def test_a_trial_is_an_ordinary_run(halved, finetune) -> None:
    _, _, found = halved
    log = answer(finetune("log", found["best"].partition("@")[0], "--json"))
    assert [commit["step"] for commit in log["checkpoints"]] == [6, 8]
    assert answer(finetune("show", found["best"], "--json"))["step"] == 8


@pytest.mark.slow
def test_failed_trials_are_recorded_with_their_reason_and_do_not_end_the_sweep(
    recipe_file, tmp_path: Path, finetune
) -> None:
    # A moment of zero over an eps of zero: NaN in the weights after the first step.
    recipe, sweep = recipe_file(train=SHORT), tmp_path / "sweep"
    found = answer(finetune("sweep", recipe, "--set=optimizer.eps=[1e-60, 1e-8, 1.01e-8]", "--sweep", sweep, "--json"))
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished", "failed"]
    assert found["trials"][2]["reason"]["code"] == "not_finite"
    assert sorted(found["leaders"]) == [f"{sweep}/trials/{number}@8" for number in ("001", "002")]
    assert found["best"] in found["leaders"]
    tried_again = finetune("sweep", sweep, "--retry-failed")
    assert tried_again.returncode == 0
    assert "trial 000 is tried again" in tried_again.stderr
    assert "trials/000: the weights after step 1 are broken: " in tried_again.stdout
    assert "\nnot distinguishable from it on these rows: " in tried_again.stdout


@pytest.mark.slow
def test_a_sweep_whose_processes_are_killed_and_stopped_trains_no_step_twice(recipe_file, tmp_path, finetune) -> None:
    long = {"train": SHORT | {"steps": 100}, "checkpoint": {"every": "100 steps"}}
    recipe, sweep = recipe_file(**long), tmp_path / "sweep"
    prepared = finetune("sweep", recipe, "--set=train.seed=[1, 2]", "--sweep", sweep, "--workers", 0)
    assert prepared.returncode == 0, prepared.stderr
    runs = [sweep / "trials/000", sweep / "trials/001"]
    first = start("sweep", sweep)
    wait_until(lambda: (sweep / "claims/000/lease.json").exists(), first)
    helper = start("sweep", sweep, "--worker")
    wait_until(lambda: last_step(runs[0]) >= 2 and last_step(runs[1]) >= 2, helper)
    helper.send_signal(signal.SIGTERM)
    first.kill()  # its training gets a SIGTERM from the kernel
    _, said = helper.communicate()
    first.communicate()
    assert helper.returncode == 143, said
    assert "trial 001 (seed=2): stopped at step " in said
    found = answer(finetune("sweep", sweep, "--json"))
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished"]
    for run in runs:
        records = [record for record in journal.read(run) if record["kind"] == "step"]
        assert [record["step"] for record in records] == [*range(1, 101)]
        started = [record["step"] for record in journal.read(run) if record.get("event") == "started"]
        assert len(started) == 2
        assert 0 < started[1] < 100


@pytest.mark.slow
def test_what_is_wrong_with_the_machine_blames_no_trial(halved, tmp_path: Path, tiny_base, finetune) -> None:
    recipe, sweep, _ = halved
    base = copied(tiny_base, tmp_path / "base")
    options = ("--set", "train.seed=[1, 2]", "--set", f"base.checkpoint={base}", "--sweep", tmp_path / "sweep")
    prepared = finetune("sweep", recipe, *options, "--workers", 0, "--json")
    assert {trial["state"] for trial in answer(prepared)["trials"]} == {"unfinished"}
    (base / "config.json").unlink()
    done = finetune("sweep", tmp_path / "sweep", "--worker")
    assert done.returncode == 1
    assert "trial 0 cannot be trained here: " in done.stderr
    assert not [trial for trial in directory.opened(tmp_path / "sweep").trials().values() if trial.reason]


@pytest.mark.slow
def test_a_dry_run_trains_nothing_and_forecasts(halved, tmp_path: Path, finetune) -> None:
    recipe, _, _ = halved
    options = (RATES, "--random", 3, "--sweep", tmp_path / "runs/sweep", "--dry-run")
    done = finetune("sweep", recipe, *options)
    assert done.returncode == 0, done.stderr
    for line in (
        "trials      3, by random search with seed 0, 1 worker of 1 thread",
        "steps       24, ",
        "time        about ",
    ):
        assert line in done.stdout
    assert not [*(tmp_path / "runs").iterdir()]


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_same_table(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts/faults/sweep_kills.py"
    words = ["--short", "--kills", "3", "--longest", "4", "--work", str(tmp_path)]
    done = forks.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 3 kills" in done.stdout
