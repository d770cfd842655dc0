"""Short and long forms of the scripts in `scripts/faults`. A form that cannot run here (no root, no strace) skips itself and says why."""

import os
import sys
from pathlib import Path

import pytest

from tests import forks
from tests.lengths import length

SCRIPTS = Path(__file__).parents[2] / "scripts/faults"


def run(name: str, *arguments: object, seconds: float = 280, **variables: str) -> None:
    command = [str(word) for word in (sys.executable, SCRIPTS / f"{name}.py", *arguments)]
    result = forks.run(command, capture_output=True, text=True, timeout=seconds, env=os.environ | variables)
    for reason in (
        "cannot mount an image: ",
        "cannot make network namespaces: ",
        "strace is not ",
        "ckpt-chaos is not installed",
    ):
        if reason in result.stderr:
            pytest.skip(result.stderr.strip())
    print(result.stdout)  # the figures of a long form, with `pytest -s`
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASS: " in result.stdout


@pytest.mark.slow
def test_a_thousand_damages_are_found_and_named() -> None:
    run("flips", "--damages", 1_000)


@pytest.mark.slow
def test_ten_thousand_damages_are_found_and_named() -> None:
    run("flips", "--damages", 10_000)


@pytest.mark.slow
def test_damages_to_a_checkpoint_of_a_training_are_found_and_named(recipe_file, train, tmp_path) -> None:
    trained = train(recipe_file(), tmp_path / "run")
    run("flips", "--damages", 400, "--checkpoint", trained / "checkpoints/step-00000010")


@pytest.mark.slow
def test_a_kill_at_any_call_of_a_save_leaves_a_sound_checkpoint() -> None:
    run("syscalls", "--faults", "SIGKILL")


@pytest.mark.slow
def test_an_error_at_a_call_of_a_save_is_one_clear_error_and_loses_nothing() -> None:
    run("syscalls", "--faults", "EIO,ENOSPC,EDQUOT,EROFS,EACCES", "--stride", length(3, 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("victim", "stride"), [(0, 40), (1, 4)])
def test_a_fault_at_a_call_of_a_rank_that_saves_its_rows_loses_nothing_and_is_told(victim, stride) -> None:
    run("syscalls", "--victim", victim, "--stride", length(stride, 1), seconds=1700)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", [None, 0, 1])
def test_faults_in_the_saves_of_a_training_leave_no_trace(victim, tmp_path) -> None:
    of_rank = () if victim is None else ("--victim", victim)
    trials, steps = (length(2, 4), 60) if victim is None else (length(1, 24), 24)
    faults = "SIGKILL,EIO,ENOSPC,EDQUOT" if victim is None else length("EIO", "SIGKILL,EIO,ENOSPC,EDQUOT")
    words = ("--real", "--faults", faults, "--trials", trials, "--set", f"train.steps={steps}", "--work", tmp_path)
    run("syscalls", *words, *of_rank, seconds=1700)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_power_cuts_leave_every_step_that_was_printed_and_trainings_end_as_if_none_had_been(tmp_path) -> None:
    cuts, resumes = length((12, 1), (40, 2))
    words = ("--cuts", cuts, "--resumes", resumes, "--set", "train.steps=100", "--work", tmp_path)
    run("power_cuts", *words, seconds=580)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("group", "points", "modes"),
    [
        ("1", (8, 40), "before,torn,term,unsynced"),
        ("2:0", (2, 28), length("torn,term", "before,torn,term,unsynced")),
        ("2:1", (2, 24), length("before,unsynced", "before,term,unsynced")),
    ],
)
def test_ckpt_chaos_passes(group, points, modes, tmp_path) -> None:
    words = ("--groups", group, "--points", length(*points), "--modes", modes, "--work", tmp_path)
    # as ckpt-chaos sets it: else none of its trainings is a fork
    run("chaos", *words, seconds=3500, PYTHONIOENCODING="utf-8")


@pytest.mark.slow
def test_bisect_names_the_step_and_the_row_of_faults_of_all_kinds(tmp_path) -> None:
    run("zoo", "--work", tmp_path / "zoo", "--stride", length(2, 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("strategy", "name", "counts"),
    [("ddp", "SIGKILL", (1, 50)), ("fsdp", "SIGKILL", (2, 50)), ("fsdp", "SIGSTOP", (1, 6))],
)
def test_a_rank_that_is_lost_ends_the_others_soon_and_restarts_end_as_if_it_had_not(
    strategy, name, counts, tmp_path
) -> None:
    words = ("--signals", name, "--strategies", strategy, "--count", length(*counts), "--work", tmp_path)
    run("rank_signals", *words, seconds=3500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hosts_that_are_cut_off_from_each_other_end_soon_and_go_on_together(tmp_path) -> None:
    words = ("--cuts", length(1, 6), "--strategies", length("fsdp", "ddp,fsdp"), "--work", tmp_path)
    run("hosts_apart", *words, seconds=1700)
