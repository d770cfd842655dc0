"""What the terminal shows while something takes long."""

import pytest

from finetune import progress
from finetune.progress import Progress
from finetune.recipe.load import load
from finetune.run import train


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
