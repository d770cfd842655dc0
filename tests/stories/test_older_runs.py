"""A run that older code began is a run: it resumes, replays, evaluates, bisects, branches and packages. `tests/fixtures/make_older_run.py` made it.

Losses are compared with what the older code recorded when it went on, with room for a CPU that rounds otherwise.
"""

import json
import shutil
from pathlib import Path

import pytest

from finetune.compare.evaluate import evaluate
from finetune.compare.measure import of_model
from finetune.debug.bisect import bisect
from finetune.debug.branch import Choices, branch
from finetune.debug.replay import replay
from finetune.errors import DataError
from finetune.package import export
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.inspect import problems
from finetune.training.run import train
from tests.conftest import chat_row

FIXTURES = Path(__file__).parents[1] / "fixtures"
RUN, BRANCH = Path("runs/older"), Path("runs/older-seed")


def recorded(run: Path, key: str) -> dict[int, float]:
    expected = json.loads(Path("expected.json").read_text())[run.name][key]
    return {int(step): loss for step, loss in expected.items()}


@pytest.fixture(params=["older_run", "run_before_rooms"])
def older(request, tmp_path, monkeypatch) -> Path:
    shutil.copytree(FIXTURES / request.param, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    return RUN


@pytest.mark.parametrize("run", [RUN, BRANCH])
def test_it_resumes_and_ends_as_it_would_have(older, run) -> None:
    train(load(run / "recipe.yaml"), run, is_quiet=True)
    records = journal.read(run)
    losses = {step: record["loss"] for step, record in journal.steps(records).items() if step > 8}
    assert losses == pytest.approx(recorded(run, "losses"), rel=1e-4)
    held_out = {step: record["loss"] for step, record in journal.evaluations(records).items()}
    assert held_out == pytest.approx(recorded(run, "held_out"), rel=1e-4)
    assert problems(str(run)) == []


@pytest.mark.parametrize("run", [RUN, BRANCH])
def test_its_plan_is_read_and_written_with_the_id_that_it_has(older, run) -> None:
    plan, facts = RunDirectory(run).plan()
    assert json.loads(plan.dump(facts))["plan_id"] == json.loads((run / "plan.json").read_text())["plan_id"]


@pytest.mark.parametrize("run", [RUN, BRANCH])
def test_its_steps_replay(older, run) -> None:
    found = replay(run, 5, 8)["first_difference"]
    assert found is None or found["replayed"] == pytest.approx(found["recorded"], rel=1e-4)


def test_it_is_evaluated_on_the_rows_that_it_held_out(older) -> None:
    results = evaluate([f"{older}@4", f"{older}@8"], None, (), is_again=True)
    assert [result["metrics"]["rows"] for result in results] == [12, 12]
    losses = dict(zip((4, 8), (result["metrics"]["loss"] for result in results), strict=True))
    assert losses == pytest.approx({step: recorded(older, "held_out")[step] for step in losses}, rel=1e-4)


@pytest.mark.slow
def test_it_is_bisected(older) -> None:
    facts = bisect(older, bad=6)
    assert facts["first_bad_step"] == 6 or facts["cause"] == "not reproduced"


def test_it_is_branched_off(older) -> None:
    made = branch(f"{older}@8", Path("runs/lower"), Choices(("optimizer.learning_rate=0.001",)), is_quiet=True)
    losses = {step: record["loss"] for step, record in journal.steps(journal.read(made)).items()}
    assert max(losses) == 12
    assert losses[9] == pytest.approx(recorded(older, "losses")[9], rel=1e-4)


@pytest.mark.slow
def test_it_is_packaged_and_the_package_knows_its_training_rows(older) -> None:
    other = [json.dumps(chat_row(number)) + "\n" for number in range(100, 110)]
    Path("data/other.jsonl").write_text("".join(other))
    facts = export.package(f"{older}@8", Path("dist/averaged"), None, export.Average((4,), of_model))
    assert {"logits", "merge"} <= {check["name"] for check in facts["checks"]}
    assert (
        evaluate(["dist/averaged"], Path("recipe.yaml"), ("data.holdout=[{path: data/other.jsonl}]",))[0]["seen_rows"]
        == 0
    )
    with pytest.raises(DataError, match=r"held-out rows are training rows of \w+@8"):
        evaluate(["dist/averaged"], Path("recipe.yaml"), ("data.split_seed=9",))


def test_its_package_verifies(tmp_path) -> None:
    package = tmp_path / "package"
    shutil.copytree(FIXTURES / "run_before_rooms/dist/older", package)
    facts = verify(str(package))
    assert facts["ok"], facts["problems"]
    assert {"logits", "provenance"} <= set(facts["checks"])
