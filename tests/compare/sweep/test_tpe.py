"""Optuna chooses trials from recorded results; kills between its storage and ours leave nothing behind."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.compare.sweep import directory, tpe
from finetune.compare.sweep.directory import Reason, Sweep, Trial
from finetune.compare.sweep.space import Range, Values
from finetune.compare.sweep.spec import Spec
from finetune.errors import FinetuneError
from finetune.recipe.load import load

SPACE = {
    "optimizer.learning_rate": Range("log", 1e-5, 1e-1),
    "adapter.rank": Range("int", 2, 9),
    "optimizer.betas": Values(([0.9, 0.95], [0.9, 0.99])),
}
SPEC = Spec(SPACE, "tpe", 30, 3, None, (), (), threads=1, steps=300, tokens=3000, memory_bytes=1)


@pytest.fixture
def sweep(recipe_file, tmp_path: Path) -> Sweep:
    pytest.importorskip("optuna")
    return directory.create(tmp_path / "sweep", SPEC, load(recipe_file()))


def finish(sweep: Sweep, trial: Trial) -> None:
    """A loss that is lowest at a learning rate of 1e-3."""
    rate = float(trial.settings["optimizer.learning_rate"])
    sweep.write(trial.with_result(10, {"loss": abs(rate / 1e-3 - 1)}, 100, is_finished=True))


def studied(sweep: Sweep) -> list[tuple[int, str]]:
    study = tpe._study(sweep.optuna, 0)
    return [(trial.user_attrs.get("trial"), trial.state.name) for trial in study.trials]


def test_trials_are_chosen_within_the_space_recorded_and_told(sweep: Sweep) -> None:
    for number in range(14):
        trial = tpe.ask(sweep)
        assert trial.number == number
        assert sweep.trials()[number] == trial
        assert 1e-5 <= trial.settings["optimizer.learning_rate"] <= 1e-1
        assert trial.settings["adapter.rank"] in range(2, 10)
        assert trial.settings["optimizer.betas"] in SPACE["optimizer.betas"].values
        finish(sweep, trial) if number else sweep.write(replace(trial, reason=Reason("not_finite", "nan")))
    tpe.conclude(sweep)
    assert studied(sweep) == [(0, "FAIL"), *((number, "COMPLETE") for number in range(1, 14))]


def test_what_a_kill_has_left_in_the_storage_is_failed_and_the_trial_is_asked_for_again(sweep: Sweep) -> None:
    finish(sweep, tpe.ask(sweep))
    lost = tpe.ask(sweep)
    (sweep.path / "records/001.json").unlink()  # the kill came before its record
    with sweep.optuna.open("ab") as file:
        file.write(b'{"op_code":4,"wor')  # and another one tore a line
    again = tpe.ask(sweep)
    assert again == lost
    assert studied(sweep) == [(0, "COMPLETE"), (1, "FAIL"), (1, "RUNNING")]


def test_a_sweep_that_goes_on_in_another_process_chooses_the_same_trials(
    recipe_file, sweep: Sweep, tmp_path: Path
) -> None:
    other = directory.create(tmp_path / "other", SPEC, load(recipe_file()))
    for _ in range(13):
        finish(sweep, tpe.ask(sweep))
    for _ in range(13):
        finish(directory.opened(other.path), tpe.ask(directory.opened(other.path)))
    assert [trial.settings for trial in other.trials().values()] == [
        trial.settings for trial in sweep.trials().values()
    ]


def test_no_more_trials_are_asked_for_than_the_sweep_has(recipe_file, sweep: Sweep, tmp_path: Path) -> None:
    short = directory.create(tmp_path / "short", replace(SPEC, trials=1), load(recipe_file()))
    assert tpe.ask(short)
    assert tpe.ask(short) is None


def test_without_optuna_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FinetuneError, match=r"pip install 'finetune\[optuna\]'"):
        tpe.optuna()
