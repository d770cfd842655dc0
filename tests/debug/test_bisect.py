"""Faults that are put into real trainings, and found: the step, the rows, and what is said where there is no answer."""

import json
import math
import sys

import pytest
import torch

from finetune.debug import states
from finetune.debug.bisect import bisect, listing
from finetune.debug.predicates import PredicateError
from finetune.errors import FinetuneError, NotFiniteError
from finetune.store.cache import root
from finetune.store.checkpoints.store import Store
from finetune.training import loop
from tests import forks
from tests.stories.poison import poison, rows_with_marks

ROWS, BATCH, STEPS = 240, 6, 30
MOST = math.ceil(math.log2(6)) + math.ceil(math.log2(5)) + 2  # evaluations, of 6 checkpoints 5 steps apart


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def poisoned(recipe_file, data, monkeypatch, tiny_tokenizer):
    """A function that writes a recipe of 30 steps with marked rows in some; returns it and the rows by step."""

    def poisoned(value, steps, **sections):
        poison(monkeypatch, tiny_tokenizer, value)
        rows = rows_with_marks(data / f"rows{steps}.jsonl", ROWS, BATCH, steps)
        rows_with_marks(data / "holdout.jsonl", 12, BATCH, [])
        train = {"steps": STEPS, "batch_size": BATCH, "precision": "fp32", "micro_batch_tokens": 256}
        parts = {
            "task": {"name": "text", "max_length": 64},
            "data": {
                name: [{"path": str(data / f"{file}.jsonl")}]
                for name, file in (("train", f"rows{steps}"), ("holdout", "holdout"))
            }
            | {"allow": ["seen_holdout"]},
            "train": train,
            "checkpoint": {"every": "5 steps", "keep": {"last": 9}},
            "optimizer": {"learning_rate": 1e-3},
            "guard": {"spike": "ignore"},
        }
        return recipe_file(**parts | sections), rows

    return poisoned


@pytest.fixture
def spiked(poisoned, train_once, tmp_path):
    """A run in which the loss of one row, in step 23, is 30 times what it should be; and that row."""
    recipe, rows = poisoned(30.0, [23])
    return train_once(recipe, tmp_path / "run", patched=30.0), rows[23]


@pytest.mark.slow
def test_a_row_with_a_high_loss_is_found_with_its_step(spiked) -> None:
    run, row = spiked
    facts = bisect(run, "loss > 10")
    assert (facts["first_bad_step"], facts["last_good_step"], facts["cause"]) == (23, 22, "rows")
    assert facts["rows"][0]["id"] == row
    assert facts["rows"][0]["share"] > 0.9
    assert sum(row["share"] for row in facts["rows"]) == pytest.approx(1)
    assert facts["evaluations"] == 0
    report = json.loads((run / "debug/step-00000023/report.json").read_bytes())
    assert report["predicate"] == "loss > 10" and report["command"].endswith("--steps 23 --inspect")
    assert any("not for good" in note for note in facts["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("quantity", ["row_loss > 20", "grad_norm > 3", "grad_norm/layers.1 > 2", "loss~2 > 6"])
def test_every_recorded_quantity_can_be_asked_for(spiked, quantity) -> None:
    assert bisect(spiked[0], quantity)["observed_step"] == 23


@pytest.mark.slow
def test_a_loss_that_ended_the_run_is_found(poisoned, train, tmp_path) -> None:
    recipe, rows = poisoned(math.nan, [23])
    with pytest.raises(NotFiniteError):
        train(recipe, tmp_path / "run")
    facts = bisect(tmp_path / "run", "loss > 1000")
    assert (facts["first_bad_step"], facts["rows"][0]["id"]) == (23, rows[23])


@pytest.fixture
def wrecked(poisoned, train_once, tmp_path):
    """A run with a row in step 23 whose gradient wrecks the weights for good; and that row."""
    optimizer = {"name": "sgd", "learning_rate": 1e-2, "max_grad_norm": 1e9, "schedule": "constant", "warmup": 0}
    recipe, rows = poisoned(20000.0, [23], optimizer=optimizer, adapter=None)
    return train_once(recipe, tmp_path / "run", patched=20000.0), rows[23]


@pytest.fixture
def sound(poisoned, train_once, tmp_path):
    """A run in which nothing is wrong."""
    return train_once(poisoned(1.0, [])[0], tmp_path / "run", patched=1.0)


@pytest.mark.slow
def test_a_state_that_went_bad_is_found_between_two_checkpoints(wrecked) -> None:
    run, row = wrecked
    facts = bisect(run, bad_evaluation="loss > 8")
    assert (facts["first_bad_step"], facts["cause"], facts["rows"][0]["id"]) == (23, "update", row)
    assert facts["evaluations"] <= MOST
    assert not list((run / "debug").glob("bisect-*"))
    assert [item.step for item in Store(run).checkpoints()] == [5, 10, 15, 20, 25, 30]


@pytest.mark.slow
def test_a_loss_that_is_bad_because_of_the_update_before_blames_that(wrecked) -> None:
    run, row = wrecked
    facts = bisect(run, "loss > 20", good=23)
    assert (facts["first_bad_step"], facts["observed_step"], facts["cause"]) == (23, 24, "update")
    assert facts["rows"][0]["id"] == row


CHECK = """
import json, sys
from pathlib import Path
step = int(json.loads((Path(sys.argv[1]) / "state.json").read_text())["step"]) if (Path(sys.argv[1]) / "state.json").exists() else 0
sys.exit(125 if step in {skipped} else int(step >= {first}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "skipped"), [(12, set()), (21, set()), (30, set()), (1, set()), (12, {13, 10, 15})])
def test_a_command_decides_as_in_git_bisect(first, skipped, sound, tmp_path) -> None:
    script = tmp_path / "check.py"
    script.write_text(CHECK.format(first=first, skipped=skipped))
    facts = bisect(sound, bad_command=f"{sys.executable} {script} {{checkpoint}}")
    assert facts["first_bad_step"] == first
    assert facts["evaluations"] <= MOST + 2 * len(skipped)
    assert any("could not tell" in note for note in facts["notes"]) == bool(skipped)


@pytest.mark.slow
def test_a_command_may_end_the_search(sound) -> None:
    with pytest.raises(FinetuneError, match="ends the search"):
        bisect(sound, bad_command=f"{sys.executable} -c 'raise SystemExit(200)'")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["once", "from then on"])
def test_a_flipped_bit_is_not_in_the_recipe_and_is_said_to_be_so(fault, poisoned, train, tmp_path, monkeypatch) -> None:
    sound = loop.train_step

    def broken(state, *arguments):
        if state.step + 1 == 12 or (fault != "once" and state.step + 1 > 12):
            with torch.no_grad():
                next(iter(state.trainable.values()))[0, 0] *= 64 if fault == "once" else 1.01
        return sound(state, *arguments)

    monkeypatch.setattr(loop, "train_step", broken)
    run = train(poisoned(1.0, [])[0], tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", sound)
    facts = bisect(run, "loss < 100", good=12 if fault == "once" else 22)
    assert facts["cause"] == "not reproduced" or fault == "once"
    if fault == "once":
        facts = bisect(run, "loss < 100", good=11)
    assert (facts["first_bad_step"], facts["cause"], facts["rows"]) == (12, "not reproduced", [])
    assert any("is not in the recipe" in note for note in facts["notes"])


@pytest.mark.slow
def test_a_learning_rate_that_is_not_the_plans_is_seen_without_a_step(poisoned, train, tmp_path, monkeypatch) -> None:
    from finetune.plan.plan import Plan

    planned = Plan.learning_rate
    monkeypatch.setattr(
        Plan, "learning_rate", lambda plan, step: 100 * planned(plan, step) if step == 16 else planned(plan, step)
    )
    run = train(poisoned(1.0, [])[0], tmp_path / "run")
    monkeypatch.setattr(Plan, "learning_rate", planned)
    facts = bisect(run, "loss < 100", good=19)
    assert (facts["first_bad_step"], facts["cause"], facts["observed_step"]) == (16, "deviation", 20)


def test_what_never_is_so_is_no_answer(spiked) -> None:
    run, _ = spiked
    assert "never bad" in bisect(run, "loss > 1000")["notes"][0]
    assert "never good" in bisect(run, "loss > 0")["notes"][0]
    assert "never good" in bisect(run, bad_evaluation="loss > 0")["notes"][0]
    assert "never bad" in bisect(run, bad_evaluation="loss > 1000")["notes"][0]
    assert "never went from good to bad" in bisect(run, "learning_rate > 0.0009", bad=10)["notes"][0]


def test_a_step_that_is_known_to_be_bad_is_explained(spiked) -> None:
    run, row = spiked
    facts = bisect(run, bad=23)
    assert (facts["first_bad_step"], facts["cause"], facts["rows"][0]["id"]) == (23, "rows", row)
    with pytest.raises(PredicateError, match="step 99 was not recorded"):
        bisect(run, bad=99)


@pytest.mark.parametrize("text", ["loss", "loss > ", "loss > four", "> 4", "loss == 4", "loss~0 > 4", "perplexity > 1"])
def test_a_predicate_that_cannot_be_read_or_was_not_recorded_is_refused(spiked, text) -> None:
    with pytest.raises(PredicateError):
        bisect(spiked[0], text)


def test_one_predicate_is_asked_for(spiked) -> None:
    with pytest.raises(PredicateError, match="give one of"):
        bisect(spiked[0])
    with pytest.raises(PredicateError, match="is not before"):
        bisect(spiked[0], "loss > 10", good=10, bad=5)


@pytest.mark.slow
def test_two_processes_find_the_same(wrecked, tiny_base, monkeypatch) -> None:
    run, row = wrecked
    monkeypatch.setenv("POISON_BASE", str(tiny_base))
    monkeypatch.setenv("POISON", "20000")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [*launcher, "tests.stories.poison", "bisect", run, "--bad-evaluation", "loss > 8", "--json"]
    result = forks.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["first_bad_step"], facts["rows"][0]["id"]) == (23, row)


def test_a_damaged_checkpoint_is_left_out_and_said(wrecked) -> None:
    run, row = wrecked
    file = run / "checkpoints/step-00000015/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.chmod(0o644)
    file.write_bytes(content)
    facts = bisect(run, bad_evaluation="loss > 8")
    assert (facts["first_bad_step"], facts["rows"][0]["id"]) == (23, row)
    assert "step-00000015 is damaged, and was skipped" in facts["notes"]


def test_a_search_is_bounded_by_what_was_made(wrecked) -> None:
    with pytest.raises(PredicateError, match="the bad step 1000 is not one of the run"):
        bisect(wrecked[0], bad_evaluation="loss > 8", bad=1000)


def test_a_command_finds_the_plan_beside_every_state(sound, tmp_path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import sys, pathlib; sys.exit(0 if (pathlib.Path(sys.argv[1]).parents[1] / 'plan.json').exists() else 1)"
    )
    facts = bisect(sound, bad_command=f"{sys.executable} {script} {{checkpoint}}", good=21, bad=25)
    assert facts["first_bad_step"] == 25  # which is given: every state between is good


@pytest.mark.slow
def test_a_run_that_may_not_be_written_has_its_answer_all_the_same(spiked, capsys, monkeypatch) -> None:
    run, row = spiked
    (run / "debug").write_text("in the way")  # root may write everywhere else
    facts = bisect(run, "loss > 10")
    assert (facts["first_bad_step"], facts["rows"][0]["id"], facts["bundle"]) == (23, row, None)
    assert [note for note in facts["notes"] if note.startswith("no bundle, as the run cannot be written: ")]
    assert "bundle:" not in listing(facts) and "first bad step: 23" in listing(facts)
    command = "sh -c 'expr $(basename {checkpoint} | sed s/step-0*//) \\< 23'"
    facts = bisect(run, bad_command=command, good=20)
    assert (facts["first_bad_step"], facts["bundle"]) == (23, None)
    assert f"{run}/debug cannot be written (Not a directory): states are written to " in capsys.readouterr().err
    (run / "debug").unlink()
    monkeypatch.setattr(states, "free_bytes", lambda place: 0 if place == run / "debug" else 1 << 40)
    assert bisect(run, bad_command=command, good=21)["first_bad_step"] == 23
    assert f"{run}/debug cannot be written (No space left on device): " in capsys.readouterr().err
    assert not list(root().glob("bisect-*"))
