"""What the terminal shows while something takes long."""

import signal

import pytest

from finetune.hosts.signals import STOPPING, Signals
from finetune.recipe.load import load
from finetune.training import progress
from finetune.training.progress import Progress
from finetune.training.run import train


def test_an_evaluation_that_takes_long_says_how_far_it_is(monkeypatch, recipe_file, tmp_path, capsys) -> None:
    monkeypatch.setattr(progress, "LINES_EVERY_SECONDS", 0.0)
    train(load(recipe_file()), tmp_path / "run", until=1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluating step 0: ")]
    done = [int(line.removeprefix("evaluating step 0: ").split()[0]) for line in said]
    assert len(done) > 1 and done == sorted(done) and done[-1] == 8
    assert said[-1] == "evaluating step 0: 8 of 8 examples  0:00 left"


@pytest.mark.parametrize(("is_quiet", "seconds"), [(True, 0.0), (False, 10.0)])
def test_one_that_is_quiet_or_short_says_nothing_on_the_way(is_quiet, seconds, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINES_EVERY_SECONDS", seconds)
    Progress(steps=10, is_quiet=is_quiet).evaluation(3, 8)(5)
    assert capsys.readouterr().err == ""


def test_a_message_is_not_glued_to_the_line_of_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown, signals = Progress(steps=10), Signals()
    signals.say, signals.is_training = shown.say, True
    shown.step(1, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens=10, seconds=1.0)
    signals._receive(signal.SIGINT)
    shown.close()
    line, said = capsys.readouterr().err.split("\r\x1b[2K")
    assert line.startswith("step  1/10") and said == f"{STOPPING}\n"


def test_a_training_has_its_signals_say_things_as_its_progress_does(monkeypatch, recipe_file, tmp_path) -> None:
    made = []
    monkeypatch.setattr("finetune.training.run.Signals", lambda: made.append(Signals()) or made[0])
    train(load(recipe_file()), tmp_path / "run", until=1)
    assert isinstance(made[0].say.__self__, Progress)
