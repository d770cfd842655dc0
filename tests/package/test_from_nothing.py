"""A model trained from random weights: config and tokenizer are a base's, the seed is the recipe's, and the package says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import BaseError, RecipeError, RunError
from finetune.model import base
from finetune.package import export, proof
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.recipe.schema import Base
from finetune.training.resolve import resolve
from finetune.training.run import train as train_run


@pytest.fixture
def empty(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base without its weights."""
    return shutil.copytree(tiny_base, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))


def directory_of(named: Base, with_weights: bool = True) -> Path:
    return base.directory(named, base.pin(named), with_weights)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_a_package_from_random_weights_says_so_and_names_no_base_model(trained, empty) -> None:
    settings = {"checkpoint": str(empty), "random_weights": 3}
    train = {"steps": 2, "batch_size": 6, "precision": "fp32"}
    run = trained("fp32", base=settings, train=train, checkpoint={})
    package = run.parent / "package"
    export.package(f"{run}@last", package, load=proof.load_here)
    assert verify(str(package))["ok"]
    card = (package / "README.md").read_text()
    assert "made by pretraining of random weights, drawn with the seed 3 for the config of `empty`" in card
    assert "base_model:" not in card and "local checkpoint" not in card
    said = json.loads((package / "provenance.intoto.jsonl").read_text())
    sources = said["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [source["name"] for source in sources][:2] == ["config", "data"] and sources[0]["uri"] == "local:empty"
    assert json.loads((package / "bom.cdx.json").read_text())["metadata"]["component"]["pedigree"]["ancestors"] == []
    trained_weights = weights_of(package)
    first = {name: tensor.bfloat16() for name, tensor in weights_of(directory_of(Base(**settings))).items()}
    assert trained_weights.keys() == first.keys() and not is_equal(trained_weights, first)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(recipe_file, train, empty, tmp_path, monkeypatch) -> None:
    recipe = recipe_file(base={"checkpoint": str(empty), "random_weights": 1}, adapter=None)
    whole = train(recipe, tmp_path / "whole")
    train_run(load(recipe), tmp_path / "parts", is_quiet=True, until=4)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "another"))  # drawn once more, to the same bits
    parts = train(recipe, tmp_path / "parts")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ends = [run / "checkpoints/step-00000010" / file for run in (whole, parts)]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    with pytest.raises(RunError, match="base.random_weights: 1 -> 2"):
        train(recipe, tmp_path / "parts", "base.random_weights=2")


def test_the_seed_and_the_config_decide_the_weights_and_nothing_else(empty, tiny_base, tmp_path, monkeypatch) -> None:
    first = weights_of(directory_of(Base(checkpoint=str(empty), random_weights=1)))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "another"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = weights_of(directory_of(Base(checkpoint=str(tiny_base), random_weights=1)))
    assert is_equal(first, again), "the weights beside a config do not count"
    assert torch.equal(torch.get_rng_state(), before)
    assert not is_equal(first, weights_of(directory_of(Base(checkpoint=str(empty), random_weights=2))))
    pins = [base.pin(Base(checkpoint=str(place), random_weights=1)) for place in (empty, tiny_base)]
    assert pins[0] == pins[1] and pins[0].kind == "config"
    config, named = json.loads((empty / "config.json").read_text()), Base(checkpoint=str(empty), random_weights=1)
    (empty / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))  # as no other config around has it
    pinned = base.pin(named)
    (empty / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(BaseError, match="is not what it was when the run was planned"):
        base.directory(named, pinned)


def test_a_plan_draws_no_weights(recipe_file, empty) -> None:
    resolved = resolve(load(recipe_file(base={"checkpoint": str(empty), "random_weights": 1}, adapter=None)))
    assert not list(resolved.base_directory.glob("*.safetensors"))
    with_seed = resolve(load(recipe_file(base={"checkpoint": str(empty), "random_weights": 2}, adapter=None)))
    assert resolved.plan.plan_id != with_seed.plan.plan_id


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"name": "lora", "rank": 2}}, "base.random_weights: an adapter on random weights learns nothing"),
        ({"origin": "owner/name", "adapter": None}, "base.origin: no Hub checkpoint is equal to `base.random_weights`"),
        ({"random_weights": -1, "adapter": None}, "base.random_weights: must be at least 0"),
    ],
)
def test_what_does_not_go_with_random_weights_is_refused(recipe_file, empty, sections, message) -> None:
    own = {name: sections.pop(name) for name in ("origin", "random_weights") if name in sections}
    with pytest.raises(RecipeError) as caught:
        load(recipe_file(base={"checkpoint": str(empty), "random_weights": 0, **own}, **sections))
    assert message in str(caught.value)


def test_random_weights_need_a_config(tmp_path, tiny_base) -> None:
    with pytest.raises(BaseError, match="`base.random_weights` needs the config of a model"):
        base.pin(Base(checkpoint="package:finetune/model.gguf", random_weights=0))
