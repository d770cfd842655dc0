"""Evaluations keep their rows: what was computed is taken again, and nothing that is about other weights, rows or settings."""

import json
import shutil
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import finetune
from finetune.cli import cli
from finetune.compare.evaluate import evaluate, every_checkpoint, results
from finetune.compare.results import Asked
from finetune.compare.watch import watch
from finetune.errors import DataError, FinetuneError, RunError
from finetune.store import evaluations
from finetune.store.checkpoints.manifest import read
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from tests import forks
from tests.conftest import chat_row, copied

NO_TORCH = """
import json, sys
from finetune.compare.evaluate import evaluate
results = evaluate(json.loads(sys.argv[1]), files=json.loads(sys.argv[2]))
heavy = {"torch", "transformers", "accelerate", "peft", "datasets"} & set(sys.modules)
print(json.dumps([results, sorted(heavy)]))
"""


def rows(path: Path, numbers) -> str:
    path.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    return str(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_sections):
    """Evaluated and committed every four of ten steps, with a set beside the held-out rows."""
    folder = tmp_path_factory.mktemp("recipe")
    docs = rows(folder / "docs.jsonl", range(100, 106))

    def recipe(name: str = "tiny", **sections: object) -> Path:
        written = {
            **tiny_sections,
            "adapter": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
            "train": {"steps": 10, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
            "evaluate": {"every": "2 steps", "sets": {"docs": [{"path": docs}]}},
            "checkpoint": {"every": "4 steps", "save_best": False, "keep": {"last": 9}},
        } | sections
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in written.items() if value is not None}))
        return path

    return recipe


@pytest.fixture
def run(recipe, train_once, tmp_path) -> Path:
    return train_once(recipe(), tmp_path / "run")


def of_step(run: Path, step: int, name: str = "held-out") -> evaluations.Evaluation:
    [found] = [each for each in evaluations.read_all(evaluations.of_step(run, step)) if each.about["set"] == name]
    return found


def without_torch(refs, files=()):
    program = [sys.executable, "-c", NO_TORCH, json.dumps([*map(str, refs)]), json.dumps([*map(str, files)])]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_training_keeps_the_rows_that_an_evaluation_from_disk_finds_to_the_bit(run) -> None:
    recorded = journal.evaluations(journal.read(run))
    for step in (0, 4, 8, 10):
        kept = {name: of_step(run, step, name) for name in ("held-out", "docs")}
        stored = evaluate([f"{run}@{step}"])
        again = evaluate([f"{run}@{step}"], is_again=True)
        assert [(each["set"], each["is_stored"]) for each in stored] == [("held-out", True), ("docs", True)]
        assert [(each["set"], each["is_stored"]) for each in again] == [("held-out", False), ("docs", False)]
        assert [each["metrics"] for each in stored] == [each["metrics"] for each in again]
        assert recorded[step]["loss"] == stored[0]["metrics"]["loss"]
        assert recorded[step]["docs/loss"] == stored[1]["metrics"]["loss"]
        for name, before in kept.items():  # what was computed again took the place of what training kept
            after = of_step(run, step, name)
            assert after.key == before.key and "run" in before.about and "run" not in after.about
            for one, other in zip(arrays(before), arrays(after), strict=True):
                assert np.array_equal(one, other)


def arrays(evaluation: evaluations.Evaluation) -> list[np.ndarray]:
    return [evaluation.contents, evaluation.rows, evaluation.tokens, *evaluation.columns.values()]


@pytest.mark.slow
def test_the_rows_of_an_evaluation_add_up_to_its_figures(run) -> None:
    for step in (0, 2, 4, 10):
        found = of_step(run, step)
        figures = found.about["metrics"]
        assert found.columns["loss"].sum() / found.tokens.sum() == pytest.approx(figures["loss"], rel=1e-12)
        assert (len(found.rows), found.tokens.sum()) == (figures["rows"], figures["tokens"]) == (8, figures["tokens"])
        assert len(set(found.contents.tolist())) == 8
    uncommitted = of_step(run, 2).about
    facts = RunDirectory(run).plan()[1]
    attempt = read(RunDirectory(run).checkpoint(4)).manifest.attempt
    assert uncommitted["model"] == f"{facts['run']}/{attempt}@2" and uncommitted["ref"] == "run@2"


@pytest.mark.slow
def test_what_is_stored_needs_neither_torch_nor_base_nor_data(recipe, train, tiny_base, chat_data, tmp_path) -> None:
    base, data = shutil.copytree(tiny_base, tmp_path / "base"), shutil.copytree(chat_data, tmp_path / "data")
    held = {name: [{"path": f"{data}/{name}.jsonl"}] for name in ("train", "holdout")}
    run = train(recipe("gone", base={"checkpoint": str(base)}, data=held), tmp_path / "run")
    shutil.rmtree(base)
    shutil.rmtree(data)
    results, heavy = without_torch([f"{run}@{step}" for step in (0, 4, "last")])
    assert heavy == [] and all(each["is_stored"] for each in results) and len(results) == 6
    assert [each["seen_rows"] for each in results] == [0] * 6
    assert [each["is_comparable"] for each in results] == [True] * 6


@pytest.mark.slow
def test_results_of_other_weights_are_never_taken(run, recipe, train_once, tmp_path) -> None:
    train = {"steps": 10, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128, "seed": 1}
    other = train_once(recipe("other", train=train), tmp_path / "other")
    shutil.rmtree(other / "evaluations")
    shutil.copytree(run / "evaluations", other / "evaluations")
    assert all(each["is_stored"] for each in evaluate([f"{other}@0"])), "the base is the same"
    made = evaluate([f"{other}@4"])
    assert [each["is_stored"] for each in made] == [False, False]
    assert made[0]["metrics"]["loss"] == journal.evaluations(journal.read(other))[4]["loss"]
    assert [each["is_stored"] for each in evaluate([f"{other}@4"])] == [True, True]


def test_steps_that_run_again_to_the_same_bits_keep_their_results(run, recipe, train) -> None:
    for step in (8, 10):
        shutil.rmtree(RunDirectory(run).checkpoint(step))
        shutil.rmtree(evaluations.of_step(run, step))
    before = evaluate([f"{run}@4"])
    train(recipe(), run)
    assert evaluate([f"{run}@4"]) == before and before[0]["is_stored"]
    assert all(each["is_stored"] for each in evaluate([f"{run}@8", f"{run}@10"]))
    # of step 6, which has no checkpoint, each attempt has its own
    assert len({each.about["model"] for each in evaluations.read_all(evaluations.of_step(run, 6))}) == 2


def test_weights_alone_keep_the_results_of_their_checkpoint(run) -> None:
    before, store = evaluate([f"{run}@4"]), Store(run)
    store.demote(store.find(4))
    assert evaluate([f"{run}@4"]) == before and before[0]["is_stored"]


def test_a_checkpoint_with_other_weights_in_its_place_is_evaluated(run) -> None:
    """As after a rollback: the step is the same, and its results are those of the weights that were given up."""
    eight, four = RunDirectory(run).checkpoint(8), evaluations.of_step(run, 4)
    shutil.rmtree(evaluations.of_step(run, 8))
    shutil.copytree(four, evaluations.of_step(run, 8))
    assert eight.is_dir() and not any(each["is_stored"] for each in evaluate([f"{run}@8"]))


def test_a_damaged_result_is_computed_again(run) -> None:
    for path in evaluations.of_step(run, 4).iterdir():
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-20])
    before = evaluate([f"{run}@4"])
    assert [each["is_stored"] for each in before] == [False, False]
    assert evaluate([f"{run}@4"]) == [each | {"is_stored": True} for each in before]


@pytest.mark.slow
def test_files_are_evaluated_like_the_rows_of_the_run(run, chat_data, tmp_path) -> None:
    file = tmp_path / "more.csv"
    file.write_text("prompt,completion\nthe model reads,a row\nan answer,that ends\n")
    first, second = evaluate([f"{run}@4", f"{run}@8"], files=[str(file)])
    assert (first["set"], first["metrics"]["rows"], first["is_stored"]) == ("more.csv", 2, False)
    results, heavy = without_torch([f"{run}@4", f"{run}@8"], [file])
    assert heavy == [] and results == [first | {"is_stored": True}, second | {"is_stored": True}]
    file.write_text("prompt,completion\nthe model reads,a row\n")
    assert evaluate([f"{run}@4"], files=[str(file)])[0]["metrics"]["rows"] == 1
    held_out = evaluate([f"{run}@4"], files=[str(chat_data / "holdout.jsonl")])[0]
    assert held_out["is_stored"], "these are the held-out rows"
    with pytest.raises(DataError, match="5 of 5 held-out rows are training rows of run@4"):
        evaluate([f"{run}@4"], files=[rows(tmp_path / "seen.jsonl", range(5))])
    [seen] = evaluate([f"{run}@4"], files=[rows(tmp_path / "seen.jsonl", range(5))], is_seen_allowed=True)
    assert seen["seen_rows"] == 5


def test_a_file_can_have_the_name_of_another_set(run, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    files = [rows(tmp_path / "a/x.jsonl", range(200, 203)), rows(tmp_path / "x.jsonl", range(203, 207))]
    assert [each["set"] for each in evaluate([f"{run}@4"], files=files)] == files
    with pytest.raises(DataError, match="has no row to evaluate|holds no rows|empty"):
        evaluate([f"{run}@4"], files=[rows(tmp_path / "none.jsonl", ())])


def test_a_model_of_no_run_is_kept_in_the_cache(tiny_base, recipe, tmp_path) -> None:
    first = evaluate([str(tiny_base)], recipe())
    assert [each["is_stored"] for each in evaluate([str(tiny_base)], recipe())] == [True, True]
    other = shutil.copytree(tiny_base, tmp_path / "other")
    assert [each["metrics"] for each in evaluate([str(other)], recipe())] == [each["metrics"] for each in first]
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0, "rope_parameters": None}))
    changed = evaluate([str(other)], recipe())
    assert not changed[0]["is_stored"]


def test_a_run_without_a_step_stands_for_all_its_checkpoints(run) -> None:
    refs = [*every_checkpoint([str(run), f"{run}@0"])]
    assert refs == [f"{run}@{step}" for step in (4, 8, 10, 0)]
    answer = CliRunner().invoke(cli, ["evaluate", str(run), "--every-checkpoint"])
    assert answer.exit_code == 0 and len(answer.stdout.splitlines()) == 6
    assert answer.stdout.splitlines()[1].startswith(f"{run}@4 on docs: loss ")
    assert all(line.endswith("  stored") for line in answer.stdout.splitlines())


def test_a_watch_ends_with_the_training_and_skips_what_is_pruned(run) -> None:
    told, said, store = [], [], Store(run)

    def tell(results) -> None:
        told.append(results[0]["ref"])
        if len(told) == 1:
            store.remove(store.find(8))

    made = watch(run, Asked(), tell, said.append)
    assert told == [f"{run}@4", f"{run}@10"] and len(made) == 4
    assert said == ["step 8 was pruned before it was evaluated; skipped"]
    with pytest.raises(RunError, match="is not a run directory"):
        watch(run / "none", Asked(), tell, said.append)


@pytest.mark.slow
def test_a_watch_beside_a_training_evaluates_each_commit_once(recipe, tmp_path) -> None:
    path, run = recipe("watched", evaluate=None), tmp_path / "run"
    with forks.Popen([sys.executable, "-m", "finetune", "train", str(path), "--run", str(run)]) as training:
        while not (run / "lease.json").exists() or not (run / "plan.json").exists():
            assert training.poll() is None
        told = []
        watch(run, Asked(), lambda results: told.append(results[0]["ref"]), told.append)
        assert training.wait() == 0
    assert told == [f"{run}@{step}" for step in (4, 8, 10)]


def test_a_watch_of_a_killed_training_says_so(run) -> None:
    lease = run / "lease.json"
    holder = json.loads(lease.read_text())
    lease.chmod(0o644)
    lease.write_text(json.dumps(holder | {"released": None, "pid": 2**22 - 1}))
    with pytest.raises(RunError, match="its training is killed"):
        watch(run, Asked(), lambda results: None, print)


@pytest.mark.slow
def test_sets_bind_no_run(run, recipe, train, capsys, tmp_path) -> None:
    before = RunDirectory(run).plan()[0]
    changed = {"sets": {"docs": [{"path": rows(tmp_path / "docs.jsonl", range(120, 123))}]}, "every": "2 steps"}
    longer = {"steps": 12, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    train(recipe("changed", evaluate=changed, train=longer), run)
    after = RunDirectory(run).plan()[0]
    assert after.segments[0].plan_id == before.plan_id
    assert [each.counts.rows for each in after.sets] == [3] != [each.counts.rows for each in before.sets]
    said = capsys.readouterr().err
    assert "evaluation set docs has other rows than before" in said
    assert "docs/loss" in said
    assert [each["is_stored"] for each in evaluate([f"{run}@12"])] == [True, True]
    four = evaluate([f"{run}@4"])
    assert [each["is_stored"] for each in four] == [True, False] and four[1]["metrics"]["rows"] == 3


def test_a_set_with_training_rows_is_refused(recipe, train, tmp_path) -> None:
    seen = {"sets": {"seen": [{"path": rows(tmp_path / "seen.jsonl", range(3, 6))}]}}
    with pytest.raises(DataError, match="evaluation set seen: 3 of 3 held-out rows are training rows of this run"):
        train(recipe("seen", evaluate=seen), tmp_path / "refused")
    assert not (tmp_path / "refused/plan.json").exists()


def with_test_set(path: Path, numbers, docs: str) -> dict:
    sets = {"docs": [{"path": docs}], "final": [{"path": rows(path / "final.jsonl", numbers)}]}
    return {"every": "2 steps", "sets": sets, "test_set": "final"}


@pytest.mark.slow
def test_a_test_set_is_evaluated_only_if_it_is_named(recipe, train, capsys, tmp_path) -> None:
    docs = rows(tmp_path / "docs.jsonl", range(100, 106))
    run = tmp_path / "run"
    train(recipe("tested", evaluate=with_test_set(tmp_path, range(110, 115), docs)), run)
    assert [each["set"] for each in evaluate([f"{run}@4"])] == ["held-out", "docs"]
    asked = Asked(rows=("final", "held-out"))
    assert [(each.rows, each.is_stored) for each in results([f"{run}@4"], asked)] == [
        ("held-out", True),
        ("final", False),
    ]
    assert [(each.rows, each.is_stored) for each in results([f"{run}@4"], Asked(rows=("final",)))] == [("final", True)]
    with pytest.raises(DataError, match="has no rows named `other`\nhint: the sets of rows are: held-out, docs, final"):
        results([f"{run}@4"], Asked(rows=("other",)))
    assert [each["set"] for each in finetune.evaluate(f"{run}@4", rows=["final"])] == ["final"]
    with pytest.raises(FinetuneError, match="`final` names a set of a recipe, and the rows are those of files"):
        Asked(rows=("final",), files=(docs,))

    printed = CliRunner().invoke(cli, ["compare", f"{run}@0", f"{run}@4", "--rows", "final", "--json"])
    found = json.loads(printed.stdout)
    assert (found["set"], found["rows"]) == ("final", 5) and "evaluate.test_set: if you choose by it" in found["notes"][
        0
    ]
    printed = CliRunner().invoke(cli, ["compare", f"{run}@0", f"{run}@4"])
    assert printed.stdout.startswith("held-out: loss") and "evaluate.test_set" not in printed.stdout


def test_a_test_set_with_rows_of_another_set_is_refused(recipe, train, chat_data, tmp_path) -> None:
    docs = rows(tmp_path / "docs.jsonl", range(100, 106))
    with pytest.raises(
        DataError, match="evaluate.test_set: 1 of 2 rows of final are also rows of the set docs\nhint: "
    ):
        train(recipe("shared", evaluate=with_test_set(tmp_path, (105, 110), docs)), tmp_path / "refused")
    held_out = with_test_set(tmp_path, (), docs)
    held_out["sets"]["final"] = [{"path": str(chat_data / "holdout.jsonl"), "take": 3}]
    with pytest.raises(DataError, match="evaluate.test_set: 3 of 3 rows of final are also held-out rows"):
        train(recipe("held", evaluate=held_out), tmp_path / "refused")
    with pytest.raises(DataError, match="evaluation set final: 2 of 3 held-out rows are training rows of this run"):
        train(recipe("seen", evaluate=with_test_set(tmp_path, (3, 4, 110), docs)), tmp_path / "refused")
    assert not (tmp_path / "refused/plan.json").exists()


def test_a_set_that_is_gone_keeps_no_run_from_being_evaluated(run, capsys) -> None:
    plan = json.loads((run / "plan.json").read_text())
    docs = Path(plan["sets"][0]["sources"][0]["name"])
    docs.rename(docs.with_suffix(".gone"))
    try:
        [result] = evaluate([f"{run}@4"], is_again=True)
    finally:
        docs.with_suffix(".gone").rename(docs)
    assert result["set"] == "held-out"
    assert f"evaluation set docs of {run} is skipped: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_delays_the_rows_of_an_evaluation_and_no_training(recipe, train, tmp_path, monkeypatch) -> None:
    written, refused = evaluations.write, []

    def full(folder, evaluation):
        if folder.name.endswith("4") and not refused:
            refused.append(folder)
            raise RunError("cannot write: no space left", where=str(folder)) from OSError(ENOSPC, "no space left")
        return written(folder, evaluation)

    monkeypatch.setattr(evaluations, "write", full)
    run = train(recipe(), tmp_path / "run")
    assert refused and [item.step for item in Store(run).checkpoints()] == [8, 10]
    assert "skipped_save" in {record["event"] for record in journal.read(run) if record["kind"] == "event"}
    assert of_step(run, 4).about["model"].endswith("@4"), "its weights were never committed"
    assert all(each["is_stored"] for each in evaluate([f"{run}@8"]))


def test_results_that_have_no_place_are_shown(run, capsys) -> None:
    folder = evaluations.of_step(run, 4)
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    assert [each["is_stored"] for each in evaluate([f"{run}@4"])] == [False, False]
    assert f"the results of {run}@4 are not kept: cannot write" in capsys.readouterr().err


def test_two_ways_to_ask_at_once_are_refused(run) -> None:
    for arguments in (["evaluate"], ["evaluate", str(run), "--watch", str(run)]):
        answer = CliRunner().invoke(cli, arguments)
        assert answer.exit_code == 2 and "give REF..., or --watch RUN" in answer.output


def test_a_moved_copy_of_a_run_has_its_results(run, tmp_path) -> None:
    moved = copied(run, tmp_path / "elsewhere/other-name")
    assert all(each["is_stored"] for each in evaluate([f"{moved}@4", f"{moved}@best"]))
