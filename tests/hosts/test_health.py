"""A hung training is told from a slow one, and from one that is only starting or ending."""

import json
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from finetune.errors import RunError
from finetune.hosts import health
from finetune.recipe.load import load
from finetune.store.run import journal, lease, silence
from finetune.training.run import train
from tests import forks

FINETUNE = [sys.executable, "-m", "finetune"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_sections) -> Path:
    place = tmp_path_factory.mktemp("health")
    recipe = tiny_sections | {"train": {"steps": 4, "precision": "fp32"}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(place / "recipe.yaml"), place / "run", is_quiet=True)
    return place / "run"


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A run that has ended."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def as_if(run: Path, pauses: list[tuple[float, str]], step: int = 0) -> silence.Watch:
    """Makes it a training of this process without a checkpoint, which has recorded these: (seconds until the next, step or event)."""
    shutil.rmtree(run / "checkpoints")
    (run / "silence.json").unlink(missing_ok=True)
    (run / "journal.jsonl").unlink()
    attempt = json.loads((run / "lease.json").read_text())["attempt"]
    moment = datetime.now(UTC) - timedelta(seconds=sum(seconds for seconds, _ in pauses))
    records = []
    for seconds, kind in pauses:
        step += kind == "step"
        about = {"kind": "step"} if kind == "step" else {"kind": "event", "event": kind}
        records.append({**about, "step": step, "attempt": attempt, "time": moment.isoformat()})
        moment += timedelta(seconds=seconds)
    watch = silence.Watch(run)
    for record in records:
        watch.hear(record)
    (run / "journal.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return watch


@pytest.mark.parametrize(
    ("pauses", "state"),
    [
        ([(1, "started"), (20, "evaluated")] + [(2, "step")] * 30 + [(250, "step")], "training"),
        ([(1, "started"), (20, "evaluated")] + [(2, "step")] * 30 + [(310, "step")], "hung"),
        ([(1, "started")] + [(100, "step")] * 5 + [(900, "step")], "training"),
        ([(1, "started")] + [(100, "step")] * 5 + [(1_100, "step")], "hung"),
        ([(600, "started"), (1, "evaluated")] + [(1, "step")] * 300 + [(3_000, "step")], "training"),
        ([(100, "started")] + [(1, "step")] * 1_500 + [(900, "step"), (301, "step")], "hung"),
        ([(9_000, "started")], "starting"),
    ],
    ids=["slow", "quick, hung", "slow steps", "slow steps, hung", "evaluation", "it has hung before", "no step yet"],
)
def test_a_hung_training_is_told_from_a_slow_one(pauses, state, finished) -> None:
    with lease.acquire(finished, "mine"):
        as_if(finished, pauses)
        facts = health.look(finished, patience_seconds=300)
    assert facts["state"] == state, facts
    assert facts["ok"] == (state != "hung")


def test_what_an_attempt_before_left_is_not_held_against_a_start(finished) -> None:
    with lease.acquire(finished, "first"):
        as_if(finished, [(1, "step")] * 20 + [(90_000, "step")])
    assert health.look(finished, 300)["state"] == "ended"
    with lease.acquire(finished, "second"):
        facts = health.look(finished, 300)
    assert facts["state"] == "starting" and facts["quiet_seconds"] < 60


def test_a_run_that_has_ended_does_not_read_like_a_fault(finished) -> None:
    facts = health.look(finished, 300)
    line = health.listing({"runs": [facts | {"quiet_seconds": 86_400 * 3}]})
    assert facts["ok"] and facts["is_finished"] and line == f"{finished}: finished: step {facts['step']}, 3 days ago"
    shutil.rmtree(finished / "checkpoints" / f"step-{facts['step']:08d}")
    line = health.listing({"runs": [health.look(finished, 300)]})
    assert "stopped, and the same command resumes: step " in line and "nothing recorded" not in line


def test_a_training_whose_last_step_is_committed_may_take_its_time_to_publish(finished) -> None:
    last = max(journal.steps(journal.read(finished)))
    with lease.acquire(finished, "mine"):
        as_if(finished, [(1, "step"), (1, "step"), (5_000, "committed")], step=last - 2)
        assert health.look(finished, 300)["state"] == "finished"


@pytest.mark.parametrize(("quiet_seconds", "state"), [(450, "saving"), (470, "hung")])
def test_a_save_is_given_the_time_of_the_slowest_disk_until_it_is_over(quiet_seconds, state, finished) -> None:
    with lease.acquire(finished, "mine"):
        watch = as_if(finished, [(1, "step")] * 5 + [(quiet_seconds, "step")], step=10)
        with watch.saving(10**9):  # 100 seconds, and a minute
            assert health.look(finished, 300)["state"] == state
        assert health.look(finished, 300)["state"] == "hung"


def test_an_attempt_knows_what_evaluations_took_in_the_attempt_before(finished) -> None:
    with lease.acquire(finished, "first"):
        as_if(finished, [(1, "started"), (600, "step"), (1, "evaluated")])
    step = {"kind": "step", "step": 3, "attempt": "second", "time": datetime.now(UTC).isoformat()}
    with lease.acquire(finished, "second"):
        silence.Watch(finished).hear(step)
        assert health.look(finished, 300)["limit_seconds"] == 6_000
        (finished / "silence.json").unlink()  # the first attempt was of older code
        silence.Watch(finished).hear(step)
        assert health.look(finished, 300)["limit_seconds"] == 6_000


def test_a_training_of_older_code_is_not_judged(finished) -> None:
    with lease.acquire(finished, "mine"):
        as_if(finished, [(1, "started"), (90_000, "step")])
        (finished / "silence.json").unlink()
        facts = health.look(finished, 300)
    assert (facts["ok"], facts["state"], facts["limit_seconds"]) == (True, "unknown", None)


def test_a_run_that_cannot_be_read_hides_no_other(finished, tmp_path) -> None:
    other = tmp_path / "of-a-newer-version"
    shutil.copytree(finished, other)
    (other / "plan.json").write_text('{"steps": 3, "a_key_of_tomorrow": 1}')
    unreadable, readable = health.look_at_all({other: 0.0, finished: 0.0}, 300)
    assert (unreadable["ok"], unreadable["state"], readable["state"]) == (False, "unreadable", "ended")
    assert unreadable["warnings"][0].startswith(f"{other}/plan.json: is damaged: ")
    assert health.listing({"ok": False, "runs": [unreadable]}).startswith(f"{other}: cannot be read\n  warning: ")


@pytest.mark.slow
def test_a_training_that_stands_still_is_found_where_it_runs_and_told(recipe_file, tmp_path, monkeypatch) -> None:
    recipe = recipe_file(train={"steps": 100_000, "precision": "fp32"}, checkpoint={"every": "99999 steps"})
    monkeypatch.setenv("FINETUNE_RUNS", str(tmp_path / "all"))
    run, process = tmp_path / "all" / recipe.stem, forks.Popen([*FINETUNE, "train", recipe, "--quiet"])
    ask = [*FINETUNE, "health", "--patience", "3", "--json"]
    try:
        while not run.exists() or max(journal.steps(journal.read(run)), default=0) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        (facts,) = of_run(forks.run(ask, capture_output=True), run)
        assert facts["state"] == "training"
        process.send_signal(signal.SIGSTOP)
        time.sleep(facts["limit_seconds"] + 1)
        answer = forks.run(ask, capture_output=True)
        (facts,) = of_run(answer, run)
        assert answer.returncode == 1 and facts["state"] == "hung", facts
        line = forks.run([*FINETUNE, "health", str(run), "--patience", "3"], capture_output=True, text=True).stdout
        assert line.startswith(f"{run}: hung at step {facts['step']}, nothing recorded for "), line
    finally:
        process.kill()
        process.wait()
    assert of_run(forks.run(ask, capture_output=True), run) == []


def of_run(answer: subprocess.CompletedProcess, run: Path) -> list[dict]:
    """What an answer says of a run; other tests may train beside this one."""
    return [one for one in json.loads(answer.stdout)["runs"] if one["run"] == str(run)]


def test_a_training_of_somebody_else_is_not_taken_for_none(monkeypatch) -> None:
    def refuse(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "cwd", refuse)
    words = ["-c", "import sys; print(flush=True); sys.stdin.read()", "finetune", "train", "mine.yaml"]
    with subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(RunError, match=r"runs/mine: is trained by process \d+ of another user"):
            health.trainings(lambda command, arguments: Path("runs/mine"))
        process.stdin.close()


def test_what_a_killed_attempt_left_is_not_held_against_the_next_before_it_has_taken_the_run(finished) -> None:
    """It downloads, or waits for other hosts; a probe that called it hung would have it killed, again and again."""
    with lease.acquire(finished, "killed"):
        as_if(finished, [(1, "step")] * 20 + [(90_000, "step")])
        assert health.look(finished, 300, since=time.time())["state"] == "hung", "its holder lives here"
        killed = json.loads((finished / "lease.json").read_text()) | {"pid_namespace": "of a container before"}
        killed |= {"since": (datetime.now(UTC) - timedelta(hours=26)).isoformat(timespec="seconds")}
        (finished / "lease.json").write_text(json.dumps(killed))
        assert health.look(finished, 300)["state"] == "hung"
        assert health.look(finished, 300, since=time.time() - 3_600)["state"] == "starting"


def test_a_training_whose_process_is_gone_was_killed_and_another_may_be_about_to_take_it(finished) -> None:
    hold = f"lease.acquire(Path({str(finished)!r}), 'mine'); os.kill(os.getpid(), 9)"
    code = f"import os; from pathlib import Path; from finetune.store.run import lease; held = {hold}"
    forks.run([sys.executable, "-c", code])
    as_if(finished, [(1, "step")] * 20)
    facts = health.look(finished, 300)
    assert (facts["ok"], facts["state"]) == (False, "killed")
    assert health.look(finished, 300, since=time.time())["state"] == "starting"


def test_the_journal_is_not_read_to_judge_a_training(finished) -> None:
    with lease.acquire(finished, "mine"):
        as_if(finished, [(600, "started"), (1, "evaluated")] + [(1, "step")] * 300 + [(3_000, "step")])
        (finished / "journal.jsonl").write_bytes(b"no record")
        assert health.look(finished, 300)["limit_seconds"] == 6_000


def test_a_directory_that_is_no_run_is_an_error(tmp_path) -> None:
    answer = forks.run([*FINETUNE, "health", tmp_path], capture_output=True, text=True)
    assert answer.returncode == 1 and "no training was ever started there" in answer.stderr


def test_a_lease_that_says_nothing_is_an_error(finished) -> None:
    (finished / "lease.json").write_text("")
    with pytest.raises(RunError, match=r"lease\.json cannot be read"):
        health.look(finished, 300)
