"""A card's figures are of the test set: rows by which nothing was chosen. It says so, and `verify` holds it to them."""

import json
import os
from pathlib import Path

import pytest
import yaml

from finetune.compare import measure
from finetune.compare import reported as of_card
from finetune.compare.reported import reported
from finetune.errors import BaseError, PackageError
from finetune.package import export, proof
from finetune.package.card import metadata
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.store import evaluations
from finetune.training.run import train
from tests.conftest import chat_row, copied
from tests.hub.client import in_turn
from tests.package.conftest import LORA

pytestmark = pytest.mark.slow


def rows(path: Path, numbers) -> str:
    path.write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(trained, data) -> Path:
    sets = {
        "docs": [{"path": rows(data / "docs.jsonl", range(100, 106))}],
        "final": {"rows": [{"path": rows(data / "final.jsonl", range(110, 120))}], "metrics": ["exact_match"]},
    }
    evaluate = {"every": "2 steps", "sets": sets, "test_set": "final"}
    every = {"every": "2 steps", "keep": {"last": 3}}
    return trained("fp32", adapter=LORA, evaluate=evaluate, checkpoint=every)


@pytest.fixture(scope="module")
def packaged(run) -> Path:
    directory = run.parent / "reported"
    export.package(f"{run}@6", directory, load=proof.load_here, report=reported)
    return directory


def records(directory: Path, event: str) -> dict[int, dict]:
    lines = map(json.loads, (directory / "training/journal.jsonl").open())
    return {line["step"]: line for line in lines if line.get("event") == event}


def abouts(run: Path, step: int) -> dict[str, dict]:
    return {about["set"]: about for about in evaluations.read_abouts(evaluations.of_step(run, step))}


def test_a_training_never_looks_at_the_test_set(run) -> None:
    assert {"held-out", "docs"} <= abouts(run, 2).keys() and "final" not in abouts(run, 2)
    evaluated = [line for line in map(json.loads, (run / "journal.jsonl").open()) if line.get("event") == "evaluated"]
    assert "docs/loss" in evaluated[0] and not [key for line in evaluated for key in line if key.startswith("final")]


def test_the_card_has_its_figures_and_says_what_chose(run, packaged) -> None:
    own, card = records(packaged, "reported"), (packaged / "README.md").read_text()
    assert own.keys() == {0, 6} and own[6]["rows"] == 10 and own[6]["earlier"] == 0
    held_out = records(packaged, "evaluated")[6]
    assert f"{own[6]['loss']:.4f} (" in card and f"{held_out['loss']:.4f}" not in card
    assert "Chosen on 8 held-out rows, reported on 10 other rows (`final`, " in card
    assert "that no choice has seen. In brackets the 95 % interval" in card
    assert f"| exact_match | {own[0]['answers']['exact_match']:.4f} | {own[6]['answers']['exact_match']:.4f} |" in card
    (index,) = metadata.read(card)["model-index"]
    assert index["results"][0]["dataset"]["name"] == "10 rows of a test set"
    assert index["results"][0]["metrics"][0]["value"] == own[6]["loss"]
    assert abouts(run, 6)["final"]["metrics"]["loss"] == own[6]["loss"]


def test_verify_holds_the_card_to_the_test_set(packaged) -> None:
    assert verify(str(packaged))["ok"]
    card, loss = packaged / "README.md", f"{records(packaged, 'reported')[6]['loss']:.4f}"
    sound = card.read_text()
    for was, now in ((loss, "0.0001"), ("10 other rows", "90 other rows"), ("no choice has seen", "a choice has seen")):
        assert was in sound
        card.write_text(sound.replace(was, now))
        assert {found["check"] for found in verify(str(packaged))["problems"]} == {"card"}
    card.write_text(sound)


@pytest.mark.parametrize("line", ['"x"', '{"kind": "event", "event": "reported", "step": 6, "answers": 3}', "{"])
def test_a_record_that_is_no_record_is_a_problem_of_the_package(packaged, line) -> None:
    journal = packaged / "training/journal.jsonl"
    sound = journal.read_text()
    journal.write_text(sound + line + "\n")
    assert "card" in {found["check"] for found in verify(str(packaged))["problems"]}
    journal.write_text(sound)


def test_a_package_made_again_computes_nothing_and_has_the_same_bytes(run, packaged, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "open_model", None)
    again = export.package(f"{run}@6", tmp_path / "again", load=proof.load_here, report=reported)
    assert {file["name"]: (tmp_path / "again" / file["name"]).read_bytes() for file in again["files"]} == {
        file["name"]: (packaged / file["name"]).read_bytes() for file in again["files"]
    }


def test_a_checkpoint_packaged_after_another_says_that_a_choice_may_have_seen_the_rows(run, packaged, tmp_path) -> None:
    export.package(f"{run}@2", tmp_path / "dist", load=proof.load_here, report=reported)
    card = (tmp_path / "dist/README.md").read_text()
    assert "1 other checkpoint of the run was evaluated on these rows before, so a choice may have seen them." in card
    assert verify(str(tmp_path / "dist"))["ok"]


def test_without_a_test_set_the_card_says_what_its_rows_chose(run, tmp_path, merged) -> None:
    export.package(f"{run}@4", tmp_path / "dist", load=proof.load_here)
    for directory in (tmp_path / "dist", merged.directory):
        card = (directory / "README.md").read_text()
        assert "Checkpoints of this run are chosen on these rows." in card and "reported on" not in card


def test_rows_that_are_gone_or_changed_are_refused_until_you_ask_for_the_held_out_ones(run, data, tmp_path) -> None:
    final, sound = data / "final.jsonl", (data / "final.jsonl").read_text()
    gone = tmp_path / "final.gone"
    final.rename(gone)
    try:
        with pytest.raises(PackageError, match="evaluation set final: .*final.jsonl"):
            export.package(f"{run}@4", tmp_path / "dist", load=proof.load_here, report=reported)
        rows(final, range(110, 121))
        with pytest.raises(PackageError, match="evaluation set final: it has other rows than when it was planned"):
            reported(f"{run}@4")
    finally:
        final.write_text(sound)
    assert not (tmp_path / "dist").exists()


def test_an_average_is_evaluated_on_the_test_set(run, tmp_path) -> None:
    average = run / "averages/it"
    ((code, _, said), (again, _, why)) = in_turn(
        dict(os.environ),
        ("average", f"{run}@4", f"{run}@6", "--output", average),
        ("package", average, tmp_path / "dist"),
    )
    assert code == 0 == again, said + why
    own = records(tmp_path / "dist", "reported")
    assert own[6]["loss"] < own[0]["loss"] and own[6]["loss"] != reported(f"{run}@6").own["loss"]
    assert verify(str(tmp_path / "dist"))["ok"]


def test_a_mean_of_steps_is_evaluated_on_the_test_set(run, tmp_path) -> None:
    directory = tmp_path / "mean"
    ((code, _, said), (again, _, why), (_, shown, _)) = in_turn(
        dict(os.environ),
        ("package", f"{run}@6", directory, "--average", 4),
        ("package", f"{run}@6", tmp_path / "plain", "--held-out"),
        ("evaluate", directory, "--recipe", run / "recipe.yaml", "--rows", "final", "--json"),
    )
    assert code == 0 == again, said + why
    own, (result,) = records(directory, "reported")[6], json.loads(shown)["results"]
    assert result["set"] == "final" and own["loss"] == pytest.approx(result["metrics"]["loss"], abs=1e-5)
    assert verify(str(directory))["ok"]
    assert not records(tmp_path / "plain", "reported")


def test_a_set_that_training_evaluated_before_it_became_the_test_set_is_told(run, tmp_path) -> None:
    finished = copied(run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["evaluate"]["test_set"] = "docs"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(tmp_path / "recipe.yaml"), finished, is_quiet=True)
    export.package(f"{finished}@6", tmp_path / "dist", load=proof.load_here, report=reported)
    card = (tmp_path / "dist/README.md").read_text()
    assert "reported on 6 other rows (`docs`, " in card and "2 other checkpoints of the run were evaluated" in card


def test_without_its_base_a_package_has_figures_of_its_own_alone(run, tmp_path, monkeypatch, capsys) -> None:
    honest = of_card.results

    def without_base(texts, asked):
        if texts[0].endswith("@0"):
            raise BaseError("is gone")
        return honest(texts, asked)

    monkeypatch.setattr(of_card, "results", without_base)
    export.package(f"{run}@6", tmp_path / "dist", load=proof.load_here, report=reported)
    assert "| held-out loss (nats per token) | not evaluated | " in (tmp_path / "dist/README.md").read_text()
    assert "the base is not evaluated on final: is gone" in capsys.readouterr().err
    assert verify(str(tmp_path / "dist"))["ok"]


def test_a_checkpoint_is_published_with_figures_of_the_test_set(run, tmp_path) -> None:
    ((code, _, said),) = in_turn(dict(os.environ), ("publish", f"{run}@6", "--to", f"folder:{tmp_path / 'out'}"))
    assert code == 0, said
    assert "reported on 10 other rows (`final`, " in (tmp_path / "out/README.md").read_text()


def test_a_damaged_result_is_computed_again(run, packaged) -> None:
    expected = reported(f"{run}@6")
    for path in evaluations.of_step(run, 6).glob("*.parquet"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-40])
    assert reported(f"{run}@6").own["loss"] == expected.own["loss"]
    assert "final" in abouts(run, 6)
