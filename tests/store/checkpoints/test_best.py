"""`@best` is the latest commit that the held-out rows cannot tell from the lowest, and no prune removes what it names."""

import random
from pathlib import Path

import numpy as np
import pytest

from finetune.plan.retention import Saved
from finetune.recipe.schema import Keep
from finetune.store import evaluations
from finetune.store.checkpoints import best, pruning
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.evaluations import Evaluation

ROWS = 100
TOKENS = np.random.default_rng(0).integers(2, 50, ROWS)
OF_ROWS = np.random.default_rng(1).gamma(4, 0.5, ROWS)


def losses(shift: float, seed: int) -> np.ndarray:
    return TOKENS * (OF_ROWS + shift + 0.05 * np.random.default_rng(seed).normal(size=ROWS))


def commit(store: Store, step: int, shift: float, seed: int | None = None, data: str = "d", has_rows: bool = True):
    """A checkpoint with a held-out loss, and its rows beside it."""
    sums = losses(shift, step if seed is None else seed)
    loss = float(sums.sum() / TOKENS.sum())
    if has_rows:
        about = {
            "schema": 1,
            "ref": f"a@{step}",
            "model": f"m{step}{seed}",
            "data": data,
            "set": "held-out",
            "task": "chat",
        }
        about |= {"settings": {}, "measures": {"loss": {"per": "tokens", "better": "lower"}}, "metrics": {"loss": loss}}
        about |= {"created": f"{step}", "seconds": 0.0}
        numbers = np.arange(ROWS)
        made = Evaluation(about, numbers.astype(np.uint64), numbers, TOKENS, {"loss": sums})
        evaluations.write(evaluations.of_step(store.run, step), made)
    manifest = Manifest(run="r", attempt="a1", step=step, parent=None, plan_id="p", metrics={"loss": loss})
    return store.commit(store.begin(step, "a1"), manifest)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    (Path("runs/a") / "plan.json").write_text("{}")
    return Store(Path("runs/a"))


def saved(store: Store) -> list[Saved]:
    return [Saved.of(item, {}) for item in store.summaries()]


def chosen(store: Store) -> tuple[int, int]:
    found = best.chosen(store.run, saved(store), {})
    assert found
    return found.step, found.lowest


def test_a_later_commit_is_best_where_the_rows_cannot_tell_it_from_the_lowest(store, capsys):
    for step, shift in ((10, 0.5), (20, 0.0), (30, 0.001), (40, 0.3)):
        commit(store, step, shift)
    assert chosen(store) == (30, 20)
    assert find(parse("runs/a@best")).step == 30
    told = (
        "runs/a: the best commit is step 30: step 20 has the best held-out loss, and the rows cannot tell them apart\n"
    )
    assert capsys.readouterr().err == told


def test_the_lowest_is_best_where_every_later_one_is_worse(store):
    for step, shift in ((10, 0.5), (20, 0.0), (30, 0.2), (40, 0.3)):
        commit(store, step, shift)
    assert chosen(store) == (20, 20)


@pytest.mark.parametrize("missing", [20, 30])
def test_without_the_results_of_rows_the_lowest_is_best(store, missing):
    for step, shift in ((10, 0.5), (20, 0.0), (30, 0.001)):
        commit(store, step, shift, has_rows=step != missing)
    assert chosen(store) == (20, 20)


def test_a_damaged_record_of_rows_is_none(store):
    for step, shift in ((20, 0.0), (30, 0.001)):
        commit(store, step, shift)
    (file,) = evaluations.of_step(store.run, 30).iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    assert chosen(store) == (20, 20)


def test_results_of_other_rows_or_of_weights_that_were_given_up_do_not_count(store):
    commit(store, 20, 0.0)
    commit(store, 30, 0.001, data="other")
    assert chosen(store) == (20, 20)
    (file,) = evaluations.of_step(store.run, 30).iterdir()
    file.unlink()
    store.remove(store.find(30))
    commit(store, 30, 0.001, seed=7)
    store.remove(store.find(30))
    commit(store, 30, 0.002, has_rows=False)  # it ran again after a rollback: the record is of the first time
    assert chosen(store) == (20, 20)


def test_of_a_run_without_a_loss_nothing_is_best(store):
    manifest = Manifest(run="r", attempt="a1", step=5, parent=None, plan_id="p")
    store.commit(store.begin(5, "a1"), manifest)
    assert best.chosen(store.run, saved(store), {}) is None


@pytest.mark.parametrize("seed", range(6))
def test_no_prune_removes_what_best_names_whenever_it_comes(store, seed):
    draw = random.Random(seed)
    rule = Keep(last=draw.choice([1, 2]), best=draw.choice([None, 1, 2]))
    for step in range(1, 13):
        shift = abs(step - draw.choice([4, 6, 8])) * draw.choice([0.0, 0.002, 0.05])
        commit(store, step, shift, has_rows=draw.random() < 0.8)
        before = chosen(store)
        for action in pruning.due(store, rule, {}, set()):
            pruning.apply(store, [action], lambda name, at: None)
            assert chosen(store) == before
    kept = {item.step for item in store.summaries()}
    assert len(kept) <= rule.last + rule.chosen_by.count + 1
