"""A tracker's process hangs, crashes or fails, and the training does not notice. What did not arrive is said, and arrives later."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.told import told as told_of
from finetune.training import companions
from finetune.training.run import train as train_run
from finetune.training.trackers import catching_up, processes, sent
from finetune.training.trackers.processes import Tracked
from tests import forks
from tests.training.trackers.story import STEPS, Told

HANGS = "while True: pass"
FAILS = """
import os
os.write(1, b"somewhere\\nValueError: the server says no\\n")
os._exit(1)
"""
CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes the process of every tracker one that does as this program does."""

    def client(program: str) -> None:
        file = tmp_path / "client.py"
        file.write_text(program)
        start = forks.Either.Popen

        class Other(forks.Either):
            @staticmethod
            def Popen(command: list, **options: object) -> object:
                return start([sys.executable, str(file)], **options)

        monkeypatch.setattr(companions, "subprocess", Other)

    return client


@pytest.mark.parametrize(
    "program, reason",
    [
        (HANGS, "it did not end within 1 second"),
        (FAILS, "ValueError: the server says no"),
        (CRASHES, "its process was ended by SIGSEGV"),
    ],
    ids=["hangs", "fails", "crashes"],
)
def test_what_a_client_does_is_said_and_ends_in_bounded_time(program, reason, client, said, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FINISH_SECONDS", 1.0)
    client(program)
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(5)
    tracked = Tracked(told.run, ["csv"], said.append)
    tracked.look()
    assert tracked.finish(1.0) == {"csv": reason}
    assert said[-1] == (
        f"tracker csv: steps 1 to 5 did not arrive ({reason}); "
        f"they are in the journal, and `finetune track {told.run}` sends them"
    )
    monkeypatch.undo()
    assert catching_up.send(told.run)["trackers"][0]["problem"] is None
    assert (told.run / "figures.csv").read_text().count("\n") == 1 + 5


def test_a_failed_process_is_said_once_and_started_again(client, said, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(companions, "RETRY_SECONDS", 0.0)
    client(FAILS)
    told = Told(tmp_path / "run", "csv")
    tracked = Tracked(told.run, ["csv"], said.append)
    for _ in range(3):
        (process,) = tracked._processes
        process.has_ended_within(10)
        tracked.look()  # it has ended
        tracked.look()  # another one starts
    assert said == [
        "tracker csv: somewhere",
        "tracker csv stopped: ValueError: the server says no; training goes on, and the journal has its figures",
    ]


def test_a_process_that_is_killed_with_its_training_loses_nothing(said, tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(9)
    tracked = Tracked(told.run, ["csv"], said.append)
    (process,) = tracked._processes
    os.kill(process._process.pid, signal.SIGKILL)
    assert process.has_ended_within(10)
    told.begin(8)
    told.train(STEPS)
    assert tracked.finish() == {}
    assert [line.split(",")[0] for line in (told.run / "figures.csv").read_text().splitlines()[1:]] == [
        str(step) for step in range(1, STEPS + 1)
    ]


def test_a_process_whose_training_is_gone_sends_the_rest_and_ends(tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(9)
    command = [sys.executable, "-m", "finetune.training.trackers", str(told.run), "csv"]
    process = forks.Popen(command, stdin=forks.PIPE, stdout=forks.PIPE)
    process.stdout.close()  # nobody listens either
    process.stdin.close()
    assert process.wait(60) == 0
    assert sent.read(told.run, "csv").step == 9


def test_two_processes_do_not_feed_one_tracker(tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    tracked = Tracked(told.run, ["csv"], print)
    while sent.read(told.run, "csv") is None:
        time.sleep(0.01)
    with pytest.raises(Exception, match="tracker csv gets the figures of another process"):
        catching_up.send(told.run)
    second = Tracked(told.run, ["csv"], print)  # of the next attempt: it waits for the first
    told.train(4)
    assert tracked.finish() == {} and second.finish() == {}
    assert (told.run / "figures.csv").read_text().count("\n") == 1 + 4


def test_a_process_that_cannot_be_started_ends_no_training(said, tmp_path, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(2)
    monkeypatch.setattr(companions.subprocess, "Popen", refuse)
    tracked = Tracked(told.run, ["csv"], said.append)
    tracked.look()
    assert tracked.finish() == {"csv": "no process could be started"}
    assert "tracker csv stopped: Resource temporarily unavailable" in said[0]


def test_an_error_is_said_without_secrets(monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cret-of-a-tracker")
    error = ValueError(
        "http://me:word@host/api\nrefuses s3cret-of-a-tracker and hf_" + "qWmZkTyRbVnXsLpDfGjHcUeAoIqYtNrKwM"
    )
    assert told_of(error) == "ValueError: http://…@host/api refuses … and …"


@pytest.mark.slow
def test_a_training_with_a_hanging_tracker_takes_no_longer_a_step(recipe_file, client, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr(Tracked.finish, "__defaults__", (1.0,))
    client(HANGS)
    run = tmp_path / "run"
    train_run(load(recipe_file(track=["csv"])), run, is_quiet=True)
    assert max(journal.steps(journal.read(run))) == 10
    assert "tracker csv: steps 1 to 10 did not arrive (it did not end within 1 second)" in capsys.readouterr().err
