"""The mean of several checkpoints is a package like any other: its weights are that mean, its figures its own, its lineage all of them."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.errors import PackageError
from finetune.package import export
from finetune.package.verify.verify import verify
from finetune.training.opened import open_model
from tests.hub.client import in_turn
from tests.package.conftest import LORA

pytestmark = pytest.mark.slow


def merged_weights(ref: str) -> dict[str, torch.Tensor]:
    return dict(open_model(ref).model.merge_and_unload().named_parameters())


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained("fp32", adapter=LORA, checkpoint={"every": "2 steps", "keep": {"last": 3}})


@pytest.fixture(scope="module")
def commands(run, tmp_path_factory) -> tuple[Path, list]:
    directory = tmp_path_factory.mktemp("average") / "dist"
    recipe = run / "recipe.yaml"
    return directory, in_turn(
        dict(os.environ),
        ("package", f"{run}@6", directory, "--average", 2, "--average", 4, "--average", 6),
        ("evaluate", directory, "--recipe", recipe, "--json"),
        ("evaluate", f"{run}@6", "--json"),
    )


def test_the_packaged_weights_are_the_mean_of_the_merged_ones(run, commands) -> None:
    directory, ((code, printed, said), *_) = commands
    assert code == 0, said
    assert "average: the mean of the weights of steps 2, 4, 6, taken in fp32" in printed
    packaged = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    each = [merged_weights(f"{run}@{step}") for step in (2, 4, 6)]
    for name, weight in packaged.items():
        assert torch.allclose(weight, torch.stack([one[name] for one in each]).mean(0), atol=1e-6), name


def test_its_figures_are_its_own_and_verify_holds_the_card_to_them(commands) -> None:
    directory, (_, (_, packaged, _), (_, last, _)) = commands
    loss, of_last = (json.loads(text)["results"][0]["metrics"]["loss"] for text in (packaged, last))
    records = [json.loads(line) for line in (directory / "training/journal.jsonl").open()]
    (averaged,) = [record for record in records if record.get("event") == "averaged"]
    assert averaged["loss"] == pytest.approx(loss, abs=1e-5) and abs(loss - of_last) > 1e-3
    card = (directory / "README.md").read_text()
    assert f"{averaged['loss']:.4f} (" in card and "the mean of steps 2, 4, 6 of 6" in card
    assert "--average 2 --average 4" in card and "averaged with step 4" in card
    assert verify(str(directory))["ok"]
    (directory / "README.md").write_text(card.replace(f"{averaged['loss']:.4f} (", "0.0001 ("))
    assert {found["check"] for found in verify(str(directory))["problems"]} == {"card"}
    (directory / "README.md").write_text(card)


def test_its_provenance_names_every_checkpoint(run, commands) -> None:
    directory, _ = commands
    predicate = json.loads((directory / "provenance.intoto.jsonl").read_text())["predicate"]
    assert predicate["buildDefinition"]["externalParameters"]["average"] == [2, 4, 6]
    for made, step in zip(predicate["runDetails"]["byproducts"], (2, 4, 6), strict=True):
        digest = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())["digest"]
        assert made["name"].startswith(f"step-{step:08d}") and f"blake3:{made['digest']['blake3']}" == digest


def test_what_cannot_be_averaged_is_refused(run, alone, tmp_path) -> None:
    average = export.Average((4,), lambda model, run: {})
    with pytest.raises(PackageError, match="the mean of adapters is no adapter"):
        export.package(f"{alone.run}@6", tmp_path / "dist", average=average)
    with pytest.raises(PackageError, match="there is nothing to average with"):
        export.package(f"{run}@4", tmp_path / "dist", average=average)
    assert not (tmp_path / "dist").exists()
