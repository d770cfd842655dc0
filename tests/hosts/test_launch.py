"""The launcher's part of a training, with small programs for ranks: codes, grace, orphans, saves under way, what ranks tell."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.hosts import signals
from finetune.hosts.launch import _outcome

LAUNCH = """
import sys
from pathlib import Path
import finetune.hosts.ranks
from finetune.hosts import launch
run, grace, restarts, processes, pause, ranks = sys.argv[1:]
launch.sys.executable = ranks
launch.BETWEEN_STARTS_SECONDS = float(pause)
finetune.hosts.ranks.AFTER_A_CRASH_SECONDS = 0.5
launch.launch({"processes": int(processes)}, [], Path(run), int(restarts), float(grace))
"""


@pytest.fixture
def launched(tmp_path):
    """Starts a launcher whose ranks run a shell script; `$RUN` is the run directory. `read -t` is a sleep that a signal ends."""

    def start(script: str, *, grace: float = 60, restarts: int = 0, processes: int = 2, pause: float = 0.1, **options):
        (tmp_path / "run").mkdir(exist_ok=True)
        ranks = tmp_path / "ranks"
        ranks.write_text(f"#!/bin/bash\n{script}\n")
        ranks.chmod(0o755)
        command = [sys.executable, "-c", LAUNCH, tmp_path / "run", grace, restarts, processes, pause, ranks]
        environment = os.environ | {"RUN": str(tmp_path / "run")}
        words = [str(word) for word in command]
        return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, **options)

    return start


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(
    ("codes", "others", "stopped_by", "outcome"),
    [
        ({0: 0, 1: 0}, (), None, (0, 0)),
        ({1: 143, 0: 143}, (), 15, (1, 143)),
        ({0: 0, 1: 0}, (), 15, (0, 0)),  # it was done already
        ({0: 143, 1: -15}, (), 15, (0, 143)),
        ({0: 143, 1: -9}, {1}, 15, (1, 137)),  # its grace was over
        ({0: 1, 1: -9}, {1}, None, (0, 1)),
        ({1: 1, 0: -9}, {1}, None, (0, 137)),  # it lost rank 0, and ended first
        ({1: 1, 0: 1}, {0, 1}, None, (1, 1)),  # a rank of another host
        ({0: 2}, (), None, (0, 2)),
        ({0: 143, 1: 143}, (), None, (0, 143)),
    ],
)
def test_one_code_for_all_ranks_is_that_of_the_one_that_began_it(codes, others, stopped_by, outcome) -> None:
    assert _outcome(codes, set(others), stopped_by) == outcome


def test_a_rank_that_ignores_the_signal_is_killed_at_the_end_of_its_grace(launched, tmp_path) -> None:
    process = launched("trap '' TERM; touch $RUN/ready$LOCAL_RANK; while :; do sleep 0.1; done", grace=2)
    for rank in range(2):
        wait_for(tmp_path / f"run/ready{rank}")
    process.terminate()
    assert ended(process)[0] == 137


def test_what_ranks_leave_behind_is_waited_for_within_the_same_grace(launched, tmp_path) -> None:
    leave = "(trap '' TERM; sleep {}; touch $RUN/left) >/dev/null 2>&1 &"
    process = launched(f"{leave.format(2)} exit 0", processes=1)
    assert ended(process)[0] == 0 and (tmp_path / "run/left").exists()
    stay = f"{leave.format(60)} trap 'sleep 2; exit 143' TERM; touch $RUN/ready; while :; do sleep 0.1; done"
    (tmp_path / "run/left").unlink()
    process = launched(stay, grace=8, processes=1)
    wait_for(tmp_path / "run/ready")
    process.terminate()
    assert ended(process)[0] == 143
    assert not (tmp_path / "run/left").exists(), "of eight seconds two are for the rank, and the rest for what it left"


def test_children_that_the_launcher_did_not_start_are_not_waited_for(tmp_path) -> None:
    """As `nvidia-smi dmon & exec finetune launch …` in an entrypoint."""
    code = LAUNCH.replace("launch.sys.executable = ranks", "launch.sys.executable = '/bin/true'")
    words = [sys.executable, "-c", code, str(tmp_path), "60", "0", "2", "0", "-"]
    script = 'sleep 30 >/dev/null 2>&1 & echo $! >&2; exec "$@"'
    process = subprocess.Popen(["bash", "-c", script, "-", *words], stderr=subprocess.PIPE, text=True)
    stranger = int(process.stderr.readline())
    assert ended(process)[0] == 0
    os.kill(stranger, signal.SIGKILL)  # it is there


def test_variables_of_other_launchers_reach_no_rank(launched, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    assert ended(launched("env >$RUN/env$LOCAL_RANK"))[0] == 0
    found = dict(line.split("=", 1) for line in (tmp_path / "run/env1").read_text().splitlines() if "=" in line)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    assert not [name for name in found if name.startswith(("TORCHELASTIC", "OMPI"))]


def test_orphans_of_ranks_are_reaped(launched, tmp_path) -> None:
    (tmp_path / "look.sh").write_text("cat /proc/$PPID/task/$PPID/children | tr ' ' '\\n' | grep -c . >$RUN/children\n")
    orphan = "for one in 1 2 3 4 5; do (sleep 0.2 &) ; done; sleep 4; . ./look.sh"
    process = launched(orphan, processes=1, cwd=tmp_path)
    assert ended(process)[0] == 0
    assert (tmp_path / "run/children").read_text().strip() == "1", "the rank alone"


def test_a_save_under_way_ends_before_the_ranks_of_a_crashed_one_are_killed(launched, tmp_path) -> None:
    save = "mkdir -p $RUN/attempts/step-1; touch $RUN/saving; sleep 3; touch $RUN/saved; rm -r $RUN/attempts/step-1"
    crash = "while [ ! -e $RUN/saving ]; do sleep 0.1; done; kill -9 $$"
    hangs = "while :; do sleep 0.1; done"
    process = launched(f'if [ "$RANK" = 0 ]; then {save}; {hangs}; else {crash}; fi')
    code, said = ended(process)
    assert code == 137 and (tmp_path / "run/saved").exists(), said


def test_a_save_that_its_rank_has_left_is_not_waited_for(launched) -> None:
    crash = "mkdir -p $RUN/attempts/step-1; kill -9 $$"
    process = launched(f'if [ "$RANK" = 0 ]; then {crash}; else while :; do sleep 0.1; done; fi', grace=1_000)
    assert ended(process)[0] == 137


def test_what_a_killed_rank_has_left_in_an_earlier_start_is_no_save_under_way(launched) -> None:
    first = "[ -e $RUN/attempts/step-1 ] || { mkdir -p $RUN/attempts/step-1; kill -9 $$; }"
    process = launched(f"{first}; [ $RANK = 0 ] || kill -9 $$; exec sleep 1000", restarts=1)
    started = time.monotonic()
    code, said = ended(process)
    assert code == 137 and said.count("starting again") == 1
    assert time.monotonic() - started < 30


def test_a_crash_is_begun_again_and_the_rank_that_began_it_is_named(launched) -> None:
    code, said = ended(launched('[ "$RANK" = 1 ] || exec sleep 1000; kill -9 $$', restarts=2))
    assert code == 137
    assert said.count("launch: rank 1 crashed (killed by SIGKILL); starting again from the last commit") == 2, said


@pytest.mark.slow
def test_an_error_that_a_rank_tells_is_not_tried_again_and_that_of_a_lost_rank_is(launched) -> None:
    code, said = ended(launched('[ "$RANK" = 0 ] && echo -n data >&$FINETUNE_TOLD; exit 1', restarts=3))
    assert (code, said.count("starting again")) == (1, 0), said
    code, said = ended(launched('[ "$RANK" = 0 ] && echo -n diverged >&$FINETUNE_TOLD; exit 1', restarts=1))
    # both ranks end at once: either may be seen first
    assert (code, len(re.findall(r"rank [01] crashed \(exit code 1\); starting again", said))) == (1, 1), said
    hangs = '[ "$RANK" = 0 ] && echo -n data >&$FINETUNE_TOLD && exec sleep 1000; exit 1'
    code, said = ended(launched(hangs, restarts=3))
    assert said.count("starting again") == 0, said
    code, said = ended(launched("echo -n lost_rank >&$FINETUNE_TOLD; exit 1", restarts=3))
    assert (code, said.count("lost another rank; starting again")) == (1, 3), said


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("INT", 130), ("HUP", 129)])
def test_a_rank_that_was_signalled_ends_them_all_and_is_no_crash(number, code, launched) -> None:
    found, said = ended(launched(f"exit {code}", restarts=3))
    assert (found, said.count("starting again")) == (code, 0), said
    found, said = ended(launched(f"kill -{number} $$", restarts=3, processes=1))
    assert (found, said.count("starting again")) == (code, 0), said


def test_a_signal_between_two_starts_ends_the_training(launched, tmp_path) -> None:
    process = launched("touch $RUN/started; kill -9 $$", restarts=9, processes=1, pause=10)
    said = process.stderr.readline() + process.stderr.readline()
    assert "starting again" in said
    process.terminate()
    assert ended(process) == (143, "")


def test_a_wish_for_a_save_before_there_is_a_training_ends_nothing(launched, tmp_path) -> None:
    process = launched("exec 3<>/dev/null; kill -USR1 $$; sleep 0.2; touch $RUN/on", processes=1)
    assert ended(process)[0] == 0 and (tmp_path / "run/on").exists()


def test_the_launcher_waits_also_where_it_was_started_with_children_ignored(launched) -> None:
    process = launched("exit 0", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert ended(process)[0] == 0


def test_a_signal_that_comes_again_at_once_is_the_same_and_a_later_one_ends_at_once(monkeypatch) -> None:
    now, ended = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    heard = signals.Signals()
    heard.is_training = True
    for at in (100.0, 100.1, 101.9):
        now[0] = at
        heard._receive(15)
    assert heard.received == 15 and not ended
    now[0] = 102.1
    heard._receive(2)
    assert ended == [130]
