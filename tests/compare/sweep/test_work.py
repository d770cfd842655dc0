"""What becomes of a training that ended, told by its exit code and its last words."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.compare.sweep import directory, trainings
from finetune.compare.sweep.directory import Reason, Sweep, Trial
from finetune.compare.sweep.space import Values
from finetune.compare.sweep.spec import Spec
from finetune.compare.sweep.trainings import Training, device_of
from finetune.compare.sweep.work import Crew
from finetune.errors import RunError
from finetune.recipe.load import LoadedRecipe, load

SPEC = Spec({"train.seed": Values((1, 2))}, "grid", 2, 0, None, (), (), threads=1, steps=20, tokens=200, memory_bytes=1)


@pytest.fixture
def loaded(recipe_file) -> LoadedRecipe:
    return load(recipe_file(publish={"repo": "owner/name"}, mirror="file:///mirror"))


@pytest.fixture
def sweep(loaded: LoadedRecipe, tmp_path: Path) -> Sweep:
    return directory.create(tmp_path / "sweep", SPEC, loaded)


def ended(sweep: Sweep, said: str) -> Training:
    log = sweep.log(0)
    log.parent.mkdir(exist_ok=True)
    log.write_text(f"of an attempt before\n{said}")
    facts = (Trial(0, {"train.seed": 1}, {}), None, None, 0, SimpleNamespace(), log, len("of an attempt before\n"))
    return Training(*facts, step=0, told=-1)


@pytest.mark.parametrize(
    ("code", "error", "said", "reason"),
    [
        (1, "not_finite", "step 3: loss is nan\nhint: look\n", Reason("not_finite", "step 3: loss is nan")),
        (2, "recipe", "--set: a: is wrong\n", Reason("recipe", "--set: a: is wrong")),
        (1, "", "Traceback\ntorch.OutOfMemoryError: CUDA\n", Reason("out_of_memory", "torch.OutOfMemoryError: CUDA")),
        (1, "", "Traceback\nKeyError: 'x'\n", Reason("crashed", "KeyError: 'x'")),
        (1, "", "", Reason("crashed", "exit code 1")),
        (1, "base", "base: is gone\n", None),
        (1, "checkpoint", "cannot write: no space left on device\n", None),
        (-9, "", "", None),
        (143, "", "committed step 3\n", None),
    ],
)
def test_a_trial_fails_by_what_its_settings_did_and_by_nothing_else(sweep, code, error, said, reason) -> None:
    assert Crew(sweep, 1, print)._reason(ended(sweep, said), code, error) == reason


def test_a_trial_that_is_killed_again_and_again_without_a_commit_fails(sweep: Sweep) -> None:
    crew, training = Crew(sweep, 1, print), ended(sweep, "")
    reasons = [crew._reason(training, -9, "") for _ in range(2)]
    (sweep.run(0) / "checkpoints/step-00000004").mkdir(parents=True)  # the third one got further
    reasons += [crew._reason(training, -9, "")]
    training.step = 4
    reasons += [crew._reason(training, -9, "") for _ in range(2)]
    assert reasons[:4] == [None] * 4
    assert reasons[4] == Reason("killed", "killed by SIGKILL 3 times at step 4; is there too little memory?")


def test_trials_are_neither_published_nor_mirrored_and_are_evaluated_at_each_rung(
    sweep: Sweep, loaded: LoadedRecipe, tmp_path
) -> None:
    trial = Trial(1, {"train.seed": 2}, {})
    words = trainings.command(sweep, trial, 4, sweep.run(1))
    assert "--set=train.seed=2" in words
    assert {"--set=publish=null", "--set=mirror=null"} <= {*words}
    assert "--until=4" in words
    assert "--set=checkpoint.keep.best=1" not in words
    halved = Spec(**{**vars(SPEC), "halving": 2, "rungs": (4, 10)})
    words = trainings.command(directory.create(tmp_path / "halved", halved, loaded), trial, None, sweep.run(1))
    assert "--set=checkpoint.keep.best=1" in words
    assert not [word for word in words if word.startswith("--until")]


def test_each_slot_gets_a_gpu_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "devices_here", lambda environment: 2)
    assert [device_of(slot, {})["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    named = {"CUDA_VISIBLE_DEVICES": "4, 7"}
    assert [device_of(slot, named)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4", "7"]
    monkeypatch.setattr(trainings, "devices_here", lambda environment: 0)
    assert device_of(0, {}) == {}


def test_a_claim_has_one_holder_and_a_record_is_read_back(sweep: Sweep) -> None:
    claim = sweep.claim(0)
    assert claim
    assert sweep.claim(0) is None
    claim.release()
    assert sweep.claim(0)
    trial = Trial(0, {"train.seed": 1}, {}).with_result(10, {"loss": float("nan")}, 100, is_finished=True)
    sweep.write(trial)
    assert sweep.trial(0).results == {10: {"loss": "nan"}}
    sweep.write(Trial(1, {"train.seed": 2}, {}, reason=Reason("crashed", "é\n")))
    assert sweep.trials()[1].reason == Reason("crashed", "é\n")


def test_a_sweep_that_was_edited_or_cut_is_refused(sweep: Sweep) -> None:
    with pytest.raises(RunError, match="is no sweep: it has no sweep.json"):
        directory.opened(sweep.path.parent)
    for name, message in (("recipe.yaml", "is not the recipe that the sweep began with"), ("sweep.json", "is damaged")):
        path = sweep.path / name
        before = path.read_bytes()
        path.unlink()
        path.write_bytes(before[: len(before) // 2])
        with pytest.raises(RunError, match=message):
            directory.opened(sweep.path)
        path.write_bytes(before)
    (sweep.path / "records").mkdir()
    (sweep.path / "records/000.json").write_text("{}")
    with pytest.raises(RunError, match=r"000\.json: is damaged"):
        sweep.trials()


def test_a_sweep_is_not_made_among_other_files(loaded: LoadedRecipe, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("{}")
    with pytest.raises(RunError, match="is not empty, and is no sweep"):
        directory.create(tmp_path / "data", SPEC, loaded)
