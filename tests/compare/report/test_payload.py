"""What a report says of runs in any state: buckets, what counts, intervals, differences, tables."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest

from finetune.compare.report.buckets import MOST_BUCKETS, MOST_STEPS, bucketed, unpacked, width_of
from finetune.compare.report.page import page
from finetune.compare.report.payload import Asked, Payload, Report
from finetune.compare.report.weights import weights
from finetune.compare.series import Steps
from finetune.errors import FinetuneError, RunError
from finetune.store import evaluations
from finetune.store.evaluations import Evaluation
from finetune.store.run import parts, row_losses
from finetune.store.run.directory import RunDirectory
from tests.compare.made_runs import OLDER, committed, evaluated, event, made, step, whole, write


def payload(*runs: Path, baseline: str | None = None) -> Payload:
    report = Report(runs, Asked(baseline))
    report.update()
    found = report.payload()
    json.loads(page(found).partition('id="data">')[2].partition("</script>")[0])  # it is JSON whatever is in it
    return found


def evaluation(
    run: Path,
    number: int,
    shift: float,
    rows: int = 40,
    *,
    flipped: bool = False,
    answers: list[str] | None = None,
    **about: object,
) -> None:
    """Stores an evaluation whose loss of each row is so much higher than that of step 0, more or less."""
    noise = np.random.default_rng(number)
    tokens = np.full(rows, 10)
    losses = 10 * (2 + np.linspace(-1, 1, rows) + shift + 0.01 * noise.standard_normal(rows))
    right = (np.linspace(0, 1, rows) > 0.5 + shift).astype(np.float64)
    right = (np.linspace(0, 1, rows) <= 0.5).astype(np.float64) if flipped else right
    facts = {"schema": 1, "ref": f"{run}@{number}", "model": f"{run}{number}", "data": "rows", "set": "held-out"}
    facts |= {"task": "chat", "settings": {}, "metrics": {"loss": 2 + shift}, "created": "2026-11-01", "seconds": 1.0}
    facts |= {"measures": {"loss": {"per": "tokens", "better": "lower"}, "right": {"per": "rows", "better": "higher"}}}
    said = [f"<b>answer {place} of step {number}</b>" for place in range(rows)]
    made_of = Evaluation(
        {**facts, **about},
        np.arange(rows, dtype=np.uint64),
        np.arange(rows),
        tokens,
        {"loss": losses, "right": right},
        answers or said,
    )
    evaluations.write(evaluations.of_step(run, number), made_of)


def test_buckets_have_the_mean_and_the_ends_of_their_steps() -> None:
    loss = np.array([1.0, 2.0, np.nan, 4.0, 5.0, np.inf, 7.0])
    columns = {name: np.ones(7) for name in ("grad_norm", "learning_rate", "tokens", "seconds")}
    nothing = {name: np.full(7, np.nan) for name in ("memory_bytes", "router_loss")}
    found = bucketed(Steps(np.arange(4, 11), {"loss": loss, **columns, **nothing}), 3)
    assert unpacked(found["steps"]).tolist() == [6, 9, 10]
    assert unpacked(found["counts"]).tolist() == [3, 3, 1]
    assert [unpacked(found["figures"]["loss"][key]).tolist() for key in ("mean", "low", "high")] == [
        [1.5, 4.5, 7.0],
        [1.0, 4.0, 7.0],
        [2.0, 5.0, 7.0],
    ]
    assert "router_loss" not in found["figures"]


@pytest.mark.parametrize("counts", [[1], [MOST_STEPS], [MOST_STEPS + 1], [100_000], [100_000] * 20, [10**7] * 3])
def test_a_page_has_a_bounded_number_of_buckets(counts) -> None:
    width = width_of(counts)
    assert width == 1 if sum(counts) <= MOST_STEPS else sum(counts) / width <= MOST_BUCKETS
    assert str(width)[0] in "125"


def test_every_step_of_a_short_run_is_exact(tmp_path) -> None:
    losses = [1 / 3, "nan", 2e-300, math.pi]
    run = made(tmp_path / "run", 4, [step(number, loss) for number, loss in enumerate(losses, start=1)])
    whole_of_it = payload(run)
    (found,) = whole_of_it["runs"]
    assert unpacked(found["steps"]["figures"]["loss"]["mean"]).tolist() == pytest.approx(
        [1 / 3, np.nan, 2e-300, math.pi], rel=0, abs=0, nan_ok=True
    )
    assert whole_of_it["notes"] == [f"{run}: the loss of 1 step is NaN or infinite, a gap in the line."]


def test_steps_given_up_stand_where_their_successors_do(tmp_path) -> None:
    rollback = event("amended", first=2, last=2, action="rollback", reason="spike", step=2, to=1, message="loss was 9")
    run = made(tmp_path / "run", 3, [step(1, 1.0), step(2, 9.0), rollback, step(3, 1.0)])
    (found,) = payload(run)["runs"]
    assert unpacked(found["steps"]["steps"]).tolist() == [1, 3]
    assert [(unpacked(each["steps"]).tolist(), unpacked(each["loss"]).tolist()) for each in found["given_up"]] == [
        ([2], [9.0])
    ]
    assert [(each["kind"], each["text"]) for each in found["timeline"]["happenings"]] == [
        ("rollback", "loss was 9; back to step 1, step 2 skipped")
    ]


def test_the_timeline_tells_what_happened(tmp_path) -> None:
    world = {"device": "cuda", "world_size": 2}
    lines = [
        event("started", step=0, world=world),
        event("spike", step=1, quantity="loss", at=1),
        committed(2),
        event("started", step=2, world=world, at=7300),
        event("damaged", check="digest", file="checkpoints/step-00000002/a", message="has other bytes", at=7301),
        event("extended", step=2, steps=[4, 8], schedule="continue", plan_id="x", at=7302),
    ]
    (found,) = payload(made(tmp_path / "run", 4, lines))["runs"]
    assert [(each["kind"], each["text"]) for each in found["timeline"]["happenings"]] == [
        ("start", "started on 2 processes (cuda)"),
        ("incident", "loss lay far above the last steps"),
        ("commit", "committed 1000 B"),
        ("resume", "resumed on 2 processes (cuda), 2 hours after the last event"),
        ("incident", "has other bytes"),
        ("resume", "extended from 4 to 8 steps"),
    ]


def test_a_branch_is_on_the_timeline_of_its_parent() -> None:
    parent, branch = OLDER, OLDER.parent / "older-seed"
    found = payload(parent, branch)["runs"][0]["timeline"]["happenings"]
    assert any(each["kind"] == "branch" and f"{branch} branches off" in each["text"] for each in found)


def test_commits_are_listed_up_to_a_bound(tmp_path) -> None:
    run = made(tmp_path / "run", 3000, [event("spike", step=1, quantity="loss"), *map(committed, range(1, 3001))])
    found = payload(run)["runs"][0]["timeline"]
    assert (len(found["happenings"]), found["unlisted"]) == (1500, 1501)
    assert {each["kind"] for each in found["happenings"]} == {"incident", "commit"}


def test_held_out_figures_have_the_interval_that_their_step_recorded(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [evaluated(0, 3.0, accuracy=0.5), step(1, 2.0), evaluated(1, 2.0, accuracy=0.6)])
    found = payload(run)["runs"][0]["held_out"]
    assert [*found] == ["loss", "accuracy"]
    assert unpacked(found["loss"]["low"]).tolist() == pytest.approx([3 - 1.96 * 0.05, 2 - 1.96 * 0.05])
    assert np.isnan(unpacked(found["accuracy"]["high"])).all()
    assert unpacked(found["loss"]["tokens"]).tolist() == [0, 100]


def test_evaluations_are_shown_up_to_a_bound_and_the_last_one_always(tmp_path) -> None:
    run = made(tmp_path / "run", 9001, [evaluated(number, 3.0) for number in range(9002)])
    found = unpacked(payload(run)["runs"][0]["held_out"]["loss"]["steps"])
    assert (len(found), found[-1], {*np.diff(found)}) == (3001, 9001, {3})


def test_stored_evaluations_give_intervals_and_differences(tmp_path) -> None:
    runs = [whole(tmp_path / name, 8) for name in ("a", "b")]
    for run, shift in zip(runs, (-0.2, 0.3), strict=True):
        evaluation(run, 0, 0.0)
        evaluation(run, 8, shift)
    found = payload(*runs)
    assert found["baselines"] == {"held-out": f"{runs[0]}@0"}
    better, worse = (run["differences"]["loss"] for run in found["runs"])
    assert unpacked(better["steps"]).tolist() == [8] and unpacked(worse["steps"]).tolist() == [0, 8]
    assert unpacked(better["high"])[0] < -0.15 and unpacked(worse["low"])[1] > 0.25
    assert found["comparison"]["rows"][0][5].endswith(", better") and found["comparison"]["rows"][1][5].endswith(
        ", worse"
    )
    other = payload(*runs, baseline=f"{runs[1]}@8")
    assert unpacked(other["runs"][0]["differences"]["loss"]["value"])[1] == pytest.approx(-0.5, abs=0.02)
    with pytest.raises(FinetuneError, match="no evaluation of `nothing@3` is stored"):
        payload(*runs, baseline="nothing@3")


def test_rows_that_flipped_come_first(tmp_path) -> None:
    run = whole(tmp_path / "run", 8)
    evaluation(run, 0, 0.0)
    evaluation(run, 8, 0.2)
    (found,) = payload(run)["samples"]
    assert (found["metric"], found["a"], found["b"]) == ("right", f"{run}@0", f"{run}@8")
    assert [(row["a"], row["b"]) for row in found["rows"]] == [(1.0, 0.0)] * 8
    assert found["rows"][0]["answer_b"].startswith("<b>answer ")
    assert found["note"] or found["rows"][0]["text"]  # where the older run's data file is at hand


def test_of_many_flips_both_kinds_are_shown(tmp_path) -> None:
    run = whole(tmp_path / "run", 8)
    evaluation(run, 0, 0.0)
    evaluation(run, 8, 0.4, rows=40, flipped=True)
    (found,) = payload(run)["samples"]
    assert [(row["a"], row["b"]) for row in found["rows"]] == [(1.0, 0.0)] * 6 + [(0.0, 1.0)] * 6


def test_rows_of_other_evaluation_sets_have_their_own_baseline(tmp_path) -> None:
    run = whole(tmp_path / "run", 8)
    for number in (0, 8):
        evaluation(run, number, number / 10)
        evaluation(run, number, number / 20, set="docs", data="others")
    found = payload(run)
    assert found["baselines"] == {"held-out": f"{run}@0", "docs": f"{run}@0"}
    assert {*found["runs"][0]["differences"]} == {"loss", "right", "docs/loss", "docs/right"}


def test_a_damaged_evaluation_is_not_there(tmp_path) -> None:
    run = whole(tmp_path / "run", 8)
    evaluation(run, 0, 0.0)
    evaluation(run, 8, 0.1)
    (path,) = evaluations.of_step(run, 8).iterdir()
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-20])
    assert payload(run)["runs"][0]["differences"] == {}


def test_recipes_are_compared_key_by_key(tmp_path) -> None:
    one, two = (whole(tmp_path / name, 8, optimizer={"learning_rate": rate}) for name, rate in (("a", 0.1), ("b", 0.2)))
    found = payload(one, two)
    assert found["recipe"] == {"head": ["key", str(one), str(two)], "rows": [["optimizer.learning_rate", "0.1", "0.2"]]}
    assert payload(one, one)["recipe"]["rows"] == []


def norms(run: Path, first: int, last: int, value: float) -> None:
    steps = list(range(first, last + 1))
    columns = {"step": steps, "layers.10": [value] * len(steps), "layers.9": [value / 2] * len(steps)}
    parts.write(RunDirectory(run).modules, steps, row_losses._table(columns), "one")


def test_gradient_norms_by_module_are_the_largest_of_each_column(tmp_path) -> None:
    run = made(tmp_path / "run", 400, [step(number, 1.0) for number in range(1, 401)])
    norms(run, 1, 200, 1.0)
    norms(run, 201, 400, 3.0)
    found = payload(run)["runs"][0]["modules"]
    assert found["modules"] == ["layers.9", "layers.10"]
    last = unpacked(found["steps"])
    assert (len(last), last[-1]) == (134, 400)
    shown = np.frombuffer(base64.b64decode(found["norms"]), dtype="<f4").reshape(2, -1)
    assert shown[1, 0] == 1.0 and shown[0, -1] == 1.5


def test_norms_that_a_rollback_took_back_are_not_shown(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(number, 1.0) for number in (1, 2, 3)])
    norms(run, 1, 3, 9.0)
    later = {"first": 2, "last": 3, "action": "rollback", "reason": "spike", "step": 3, "to": 1}
    write(run, [event("amended", at=10**9, **later), step(4, 1.0)])
    found = payload(run)["runs"][0]["modules"]
    shown = np.frombuffer(base64.b64decode(found["norms"]), dtype="<f4").reshape(2, -1)
    assert shown[1].tolist() == pytest.approx([9.0, np.nan, np.nan, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    "lines", [[], [event("started", step=0)], [evaluated(0, 3.0)], [step(1, "nan")], [step(1, 1.0), '{"kind": "st']]
)
def test_a_run_in_any_state_has_a_report(tmp_path, lines) -> None:
    found = payload(made(tmp_path / "run <script>", 9, lines), OLDER)
    assert [run["recorded"] for run in found["runs"]] == [sum('"step", "step"' in line for line in lines), 8]


def test_a_folder_that_is_no_run_is_named(tmp_path) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        payload(tmp_path)


def test_a_report_follows_its_runs(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(1, 3.0)])
    report = Report([run], Asked())
    assert report.update() and not report.update()
    write(run, [step(2, 2.0)])
    assert report.update() and not report.update()
    evaluation(run, 2, 0.0)
    assert report.update() and not report.update()
    assert report.payload()["runs"][0]["recorded"] == 2


@pytest.mark.slow
def test_a_real_training_has_memory_norms_and_held_out_figures(recipe_file, train_once, tmp_path) -> None:
    run = train_once(recipe_file(evaluate={"every": "4 steps"}), tmp_path / "run")
    (found,) = payload(run)["runs"]
    assert unpacked(found["steps"]["steps"]).tolist() == [*range(1, 11)]
    assert (unpacked(found["steps"]["figures"]["memory_bytes"]["mean"]) > 10**8).all()
    assert {"layers.0", "layers.1"} <= {*found["modules"]["modules"]}
    assert unpacked(found["held_out"]["loss"]["steps"]).tolist() == [0, 4, 8, 10]
    assert unpacked(found["differences"]["loss"]["steps"]).tolist() == [4, 8, 10]
    assert found["is_finished"]
    (changed,) = weights([run, run])
    assert (changed["ref"], changed["total"] > 0) == (f"{run}@10", True)
    assert {"layers.0", "layers.1"} <= {module["module"] for module in changed["modules"]}
