"""A run ends early where the rows show no improvement, at the same step however often it was interrupted; and the best is by any figure."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetune.errors import RecipeError
from finetune.recipe.load import load
from finetune.recipe.schema import Best, EarlyStopping
from finetune.store import evaluations
from finetune.store.checkpoints import best
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.evaluations import Evaluation
from finetune.store.run import journal
from finetune.store.run.inspect import log
from finetune.training.early_stopping import Patience
from finetune.training.run import train as train_run
from tests.conftest import chat_row


@pytest.fixture
def recipe(tiny_sections, tmp_path):
    """It learns nothing: its rate is almost 0."""
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in range(100, 106)))

    def recipe(name: str = "still", rate: float = 1e-9, **sections: object) -> Path:
        stopping = sections.pop("early_stopping", {"patience": 2})
        steps = {"steps": 12, "batch_size": 4, "precision": "fp32", "micro_batch_tokens": 128}
        written = {
            **tiny_sections,
            "optimizer": {"learning_rate": rate},
            "train": steps | ({"early_stopping": stopping} if stopping else {}),
            "evaluate": {"every": "2 steps", "sets": {"docs": [{"path": str(docs)}]}},
            "checkpoint": {"every": "3 steps", "keep": {"last": 9}},
        } | sections
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return recipe


@pytest.mark.slow
def test_a_run_without_improvement_ends_early_and_stays_ended(recipe, train, tmp_path, capsys) -> None:
    run = train(recipe(), tmp_path / "run")
    said = "none of the last 2 evaluations is better than that of step 0, by held-out loss"
    assert max(item.step for item in Store(run).checkpoints()) == 4
    assert f"stopped early at step 4: {said}" in capsys.readouterr().err
    assert [each["message"] for each in log(run)["incidents"]] == [said]
    train(recipe(), run)
    assert max(journal.steps(journal.read(run))) == 4 and "finished at step 4" in capsys.readouterr().err
    train(recipe("on", early_stopping=None), run)
    assert max(item.step for item in Store(run).checkpoints()) == 12


@pytest.mark.slow
def test_an_interrupted_run_ends_where_a_whole_one_does(recipe, train, tmp_path) -> None:
    run = tmp_path / "run"
    for until in (1, 2, 3):
        train_run(load(recipe()), run, until=until, is_quiet=True)
    train(recipe(), run)
    assert max(journal.steps(journal.read(run))) == 4


@pytest.mark.slow
def test_a_run_that_improves_goes_to_its_end(recipe, train, tmp_path) -> None:
    run = train(recipe("learns", rate=0.01), tmp_path / "run")
    assert max(item.step for item in Store(run).checkpoints()) == 12


@pytest.mark.slow
def test_the_best_is_by_the_figure_that_the_recipe_names(recipe, train, tmp_path) -> None:
    keep = {"last": 1, "best": {"count": 1, "metric": "docs/loss", "better": "higher"}}
    sections = {"early_stopping": None, "checkpoint": {"every": "2 steps", "keep": keep}}
    run = train(recipe("best", rate=0.01, **sections), tmp_path / "run")
    figures = {step: each["docs/loss"] for step, each in journal.evaluations(journal.read(run)).items() if step}
    worst = max(figures, key=figures.get)
    kept = {item.step for item in Store(run).checkpoints()}
    assert worst in kept and 12 in kept
    chosen = find(parse(f"{run}@best")).step
    assert chosen >= worst
    state = json.loads((run / "checkpoints/step-00000012/trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (
        0,
        journal.evaluations(journal.read(run))[0]["docs/loss"],
    )


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"checkpoint": {"keep": {"best": {"metric": "docs/exact_match"}}}},
            "checkpoint.keep.best.metric: training computes",
        ),
        ({"checkpoint": {"keep": {"best": {"metric": "none/loss"}}}}, "like `docs/loss`, not `none/loss`"),
        ({"checkpoint": {"keep": {"best": 0}}}, "checkpoint.keep.best: must be a count like `1`, or a section like"),
        (
            {"early_stopping": {"metric": "accuracy"}},
            "train.early_stopping.metric: training computes `loss` or `perplexity`",
        ),
        ({"evaluate": {}}, "train.early_stopping: needs evaluations; set `evaluate.every`"),
    ],
)
def test_figures_that_training_does_not_compute_decide_nothing(recipe, sections, said) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe("wrong", **sections))
    assert said in str(caught.value)


def test_a_count_is_short_for_the_section(recipe) -> None:
    for given in (3, {"count": 3}):
        keep = load(recipe("short", checkpoint={"keep": {"best": given}})).recipe.checkpoint.keep
        assert keep.best == keep.chosen_by == Best(count=3) and keep.best.is_lower
    assert not Best(metric="accuracy").is_lower and Best(metric="docs/perplexity").measure == "loss"


class Recorder:
    """The part of one that `Patience` asks."""

    is_writer, evaluations, path = True, {}, Path("nowhere")

    def event(self, *_: object, **__: object) -> None: ...

    progress = type("Progress", (), {"say": staticmethod(lambda line: None)})


def ended(losses: np.ndarray, recipe, patience: int = 3) -> int | None:
    """The evaluation at which a run with these losses of rows (evaluations, rows) ends."""
    plan = type("Plan", (), {"recipe": load(recipe).recipe})
    made = Patience(plan, Recorder())
    made._asked = EarlyStopping(patience=patience)
    for number, sums in enumerate(losses):
        about = {"set": "held-out", "data": "", "metrics": {"loss": sums.mean()}}
        about["measures"] = {"loss": {"per": "tokens", "better": "lower"}}
        ones = np.ones(len(sums), dtype=np.int64)
        made.add(2 * number, [Evaluation(about, ones.astype(np.uint64), ones, ones, {"loss": sums})])
        if made._last_improvement(2 * number) is not None:
            return number
    return None


def test_luck_of_the_rows_does_not_prolong_a_run_and_a_small_true_gain_does(recipe) -> None:
    random, rows = np.random.default_rng(0), random_rows(200)
    still = [rows + random.normal(0, 0.1, 200) for _ in range(20)]
    ends = [ended(np.array(still[first:]), recipe()) for first in range(12)]
    assert all(end is not None and end <= 5 for end in ends)
    gains = np.array([rows - 0.05 * number + random.normal(0, 0.1, 200) for number in range(20)])
    assert ended(gains, recipe()) is None


def random_rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).gamma(2.0, 1.0, count)


def test_a_rollback_takes_later_evaluations_back(recipe) -> None:
    plan = type("Plan", (), {"recipe": load(recipe()).recipe})
    made = Patience(plan, Recorder())
    about = {"set": "held-out", "data": "", "metrics": {"loss": 1.0}, "measures": {"loss": {"per": "rows"}}}
    one = Evaluation(about, np.ones(4, np.uint64), np.ones(4, np.int64), np.ones(4, np.int64), {"loss": np.ones(4)})
    for step in (0, 2, 4, 3, 2):
        made.add(step, [one])
    assert sorted(made._found) == [0, 2]
    assert best.is_worse(one, one, EarlyStopping(), 2) is False and evaluations.HELD_OUT == "held-out"
