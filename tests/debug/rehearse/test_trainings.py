"""Processes and their directory go together, however the program that started them ends."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from finetune.debug.rehearse.trainings import TrainingError, trainings_beside
from finetune.errors import RunError

SLEEPER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True); time.sleep(99)"
PROGRAM = """
import sys, time
from pathlib import Path
from finetune.debug.rehearse.trainings import trainings_beside
with trainings_beside(Path(sys.argv[1]), is_kept=False) as trainings:
    command = [sys.executable, "-c", sys.argv[3]]
    if sys.argv[2] == "waits":
        trainings.run(command)
    trainings.start(command)
    while True:
        time.sleep(0.01)
"""
# orphans below it become its children, which it does not reap, as PID 1 of many a container
ADOPTER = "import ctypes, subprocess, sys; ctypes.CDLL(None).prctl(36, 1); sys.exit(subprocess.call(sys.argv[1:]))"


def heed_hangups() -> None:
    """Also where the tests run under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # reaped meanwhile
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("where", ["waits", "polls"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_takes_processes_and_directory_away(number, code, where, tmp_path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), where, SLEEPER]
    program = subprocess.Popen(command, preexec_fn=heed_hangups)
    deadline = time.monotonic() + 60
    while len(started := psutil.Process(program.pid).children(recursive=True)) < 2:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    program.send_signal(number)
    assert program.wait(timeout=60) == code
    assert list(tmp_path.iterdir()) == []
    assert not any(map(lives, started))


def test_what_was_killed_and_is_not_reaped_is_not_waited_for(tmp_path) -> None:
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), "polls", SLEEPER]
    with subprocess.Popen([sys.executable, "-c", ADOPTER, *program]) as adopter:
        deadline = time.monotonic() + 60
        while len(started := psutil.Process(adopter.pid).children(recursive=True)) < 3:
            assert adopter.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        started[0].terminate()
        assert adopter.wait(timeout=20) == 143


def test_an_error_takes_processes_and_directory_away(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), trainings_beside(tmp_path / "run", is_kept=False) as trainings:
        process = trainings.start([sys.executable, "-c", SLEEPER])
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_the_last_words_of_a_process_that_fails_are_its_error(tmp_path) -> None:
    command = [sys.executable, "-c", "import sys; print('what went wrong', file=sys.stderr); sys.exit(2)"]
    message = "the training ended with exit code 2:\n  what went wrong"
    with pytest.raises(TrainingError, match=message) as caught, trainings_beside(tmp_path / "run", False) as trainings:
        trainings.run(command)
    assert caught.value.exit_code == 2


def test_what_is_kept_stays_and_is_not_touched_by_the_next(tmp_path) -> None:
    with trainings_beside(tmp_path / "run", is_kept=True) as trainings:
        trainings.run([sys.executable, "-c", ""])
    with (
        pytest.raises(RunError, match="run.rehearsal: is left of another rehearsal"),
        trainings_beside(tmp_path / "run", is_kept=False),
    ):
        pass
    assert (tmp_path / "run.rehearsal/log").exists()
