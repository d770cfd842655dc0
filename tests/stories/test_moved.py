"""A run whose base, data or own directory was moved goes on wherever the bytes are equal, and says so; other bytes are refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml

from finetune.compare import prompts
from finetune.compare.evaluate import evaluate
from finetune.compare.generate import generate
from finetune.compare.generation.settings import Settings
from finetune.debug.branch import Choices, branch
from finetune.debug.replay import replay
from finetune.errors import BaseError, CheckpointError, DataError, RunError
from finetune.model.base import pin
from finetune.package.export import package
from finetune.recipe.load import load
from finetune.recipe.schema import Base
from finetune.store import places
from finetune.store.run import journal
from finetune.training.run import train
from tests.hub.client import in_turn
from tests.stories.same_run import _of_directories

ADAPTER = {"name": "lora", "rank": 4, "alpha": 8}
ASKED = [prompts.of_text("the model", "")]


def project(directory: Path, tiny_base: Path, chat_data: Path, **sections: object) -> Path:
    """A folder with models/, data/, a recipe that names them absolutely, and a run of four steps."""
    shutil.copytree(tiny_base, directory / "models/tiny")
    shutil.copytree(chat_data, directory / "data")
    recipe = {
        "base": {"checkpoint": str(directory / "models/tiny")},
        "task": {"name": "chat", "max_length": 64},
        "data": {part: [{"path": str(directory / f"data/{part}.jsonl")}] for part in ("train", "holdout")},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 4, "batch_size": 6, "precision": "fp32"},
        "checkpoint": {"every": "2 steps", "keep": {"last": 5}},
        **sections,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(directory / "recipe.yaml"), directory / "runs/a", is_quiet=True)
    return directory


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_base, chat_data) -> Path:
    return project(tmp_path_factory.mktemp("adapted"), tiny_base, chat_data, adapter=ADAPTER)


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_base, chat_data) -> Path:
    return project(tmp_path_factory.mktemp("full"), tiny_base, chat_data)


@pytest.fixture
def moved(adapted, tmp_path, monkeypatch) -> Path:
    """The project of the adapter under another name; nothing is left under the old one."""
    shutil.copytree(adapted, tmp_path / "new")
    hidden = adapted.with_name("hidden")
    adapted.rename(hidden)
    yield tmp_path / "new"
    hidden.rename(adapted)


def extended(recipe: Path, steps: int) -> None:
    text = yaml.safe_load(recipe.read_text())
    text["train"]["steps"] = steps
    recipe.write_text(yaml.safe_dump(text))


def renamed(recipe: Path, **names: str) -> None:
    """The recipe with other names for base and data."""
    text = yaml.safe_load(recipe.read_text())
    text["base"]["checkpoint"] = names.get("base", text["base"]["checkpoint"])
    for part in ("train", "holdout"):
        if part in names:
            text["data"][part] = [{"path": names[part]}]
    recipe.write_text(yaml.safe_dump(text))


@pytest.mark.slow
def test_a_project_that_was_moved_as_a_whole_goes_on_without_a_word_of_the_user(moved, adapted, capsys) -> None:
    run = moved / "runs/a"
    (result,) = evaluate([f"{run}@4"], None, (), is_again=True)
    assert result["metrics"]["loss"] > 0
    said = capsys.readouterr().err
    assert f"base {adapted}/models/tiny is now {moved}/models/tiny: equal content\n" in said
    assert f"data {adapted}/data/holdout.jsonl is now {moved}/data/holdout.jsonl: equal content\n" in said
    assert generate([f"{run}@2"], ASKED, Settings(max_new_tokens=4))[0]["text"] is not None
    assert replay(run, 2, 4)["identical"]
    extended(moved / "recipe.yaml", 6)
    train(load(moved / "recipe.yaml"), run, is_quiet=True)
    assert sorted(journal.steps(journal.read(run))) == [1, 2, 3, 4, 5, 6]
    made = branch(f"{run}@2", moved / "runs/b", Choices(("optimizer.learning_rate=0.001",)), is_quiet=True)
    assert max(journal.steps(journal.read(made))) >= 4
    assert package(f"{run}@6", moved / "dist")["files"]


@pytest.mark.slow
def test_base_and_data_are_found_where_the_user_says_and_remembered_by_the_run(
    moved, adapted, tmp_path, capsys
) -> None:
    run = shutil.move(moved / "runs/a", tmp_path / "alone")
    shutil.move(moved / "models/tiny", tmp_path / "weights")
    shutil.move(moved / "data", tmp_path / "rows")
    (tmp_path / "rows/train.jsonl").rename(tmp_path / "rows/renamed.jsonl")
    with pytest.raises(BaseError) as caught:
        evaluate([f"{run}@4"], None, (), is_again=True)
    assert str(caught.value) == (
        f"{adapted}/models/tiny: is not here any more\n"
        "hint: name the folder where it is now with --base PATH_OR_ID: equal content is the same base"
    )
    with places.named([str(tmp_path / "weights")], {}), pytest.raises(DataError) as caught:
        evaluate([f"{run}@4"], None, (), is_again=True)
    assert caught.value.message == "is not here any more" and "--data OLD=NEW" in caught.value.hint
    data = {f"{adapted}/data": f"{tmp_path}/rows", f"{adapted}/data/train.jsonl": f"{tmp_path}/rows/renamed.jsonl"}
    with places.named([str(tmp_path / "weights")], dict(reversed(data.items()))):
        evaluate([f"{run}@4"], None, (), is_again=True)
        extended(moved / "recipe.yaml", 5)
        train(load(moved / "recipe.yaml"), run, is_quiet=True)
    known = json.loads((run / "plan.json").read_text())["facts"]["places"]
    assert known[f"{adapted}/models/tiny"] == f"{tmp_path}/weights"
    places._known.found.clear()
    assert evaluate([f"{run}@5"], None, (), is_again=True), "the run knows it by now"


def test_other_content_is_refused_wherever_it_is_named(moved, adapted, tmp_path) -> None:
    run = shutil.move(moved / "runs/a", tmp_path / "alone")
    shutil.copytree(moved / "models/tiny", tmp_path / "other")
    (tmp_path / "other/config.json").write_text((tmp_path / "other/config.json").read_text() + "\n")
    (tmp_path / "rows.jsonl").write_text((moved / "data/train.jsonl").read_text() + "\n")
    with places.named([str(tmp_path / "other")], {}), pytest.raises(BaseError) as caught:
        evaluate([f"{run}@4"], None, (), is_again=True)
    assert caught.value.message == f"has other content than {adapted}/models/tiny had"
    named = places.named([str(moved / "models/tiny")], {f"{adapted}/data/train.jsonl": str(tmp_path / "rows.jsonl")})
    with named, pytest.raises(DataError) as caught:
        replay(run, 2, 3)
    assert caught.value.message == f"has other content than {adapted}/data/train.jsonl had"
    assert "`finetune branch" in caught.value.hint


def test_a_recipe_with_new_names_for_equal_content_resumes_and_one_for_other_content_does_not(
    moved, adapted, tmp_path, capsys
) -> None:
    run, recipe = shutil.move(moved / "runs/a", tmp_path / "alone"), moved / "recipe.yaml"
    names = {"base": f"{moved}/models/tiny", "train": f"{moved}/data/train.jsonl"}
    renamed(recipe, holdout=f"{moved}/data/holdout.jsonl", **names)
    extended(recipe, 5)
    before = json.loads((run / "plan.json").read_text())
    train(load(recipe), run, is_quiet=True)
    said = capsys.readouterr().err
    assert f"base {adapted}/models/tiny is now {moved}/models/tiny: equal content\n" in said
    after = json.loads((run / "plan.json").read_text())
    assert after["base"] == before["base"] and after["train"] == before["train"]
    renamed(recipe, train=f"{moved}/data/holdout.jsonl")
    with pytest.raises(RunError) as caught:
        train(load(recipe), run, is_quiet=True)
    assert "data.train[0].path" in caught.value.message and "finetune branch" in caught.value.hint


@pytest.mark.slow
def test_whole_weights_need_no_base(full, tmp_path) -> None:
    run, hidden = full / "runs/a", full / "elsewhere"
    (full / "models").rename(hidden)
    try:
        (result,) = evaluate([f"{run}@4"], None, (), is_again=True)
        assert result["metrics"]["loss"] > 0
        assert generate([f"{run}@4"], ASKED, Settings(max_new_tokens=4))
        assert package(f"{run}@4", tmp_path / "dist")["files"]
        with pytest.raises(BaseError, match="is not here any more"):
            evaluate([f"{run}@0"], None, (), is_again=True)
    finally:
        hidden.rename(full / "models")


@pytest.mark.slow
def test_whole_weights_are_trained_on_without_the_base_as_with_it(full, tmp_path, capsys) -> None:
    runs = {name: shutil.copytree(full / "runs/a", tmp_path / name) for name in ("with", "without")}
    extended(full / "recipe.yaml", 8)
    recipe = load(full / "recipe.yaml")
    train(recipe, runs["with"], is_quiet=True)
    (full / "models").rename(full / "elsewhere")
    try:
        capsys.readouterr()
        train(recipe, runs["without"], is_quiet=True)
        about = "is not here any more; step 4 of this run has all weights and stands in for it"
        assert f"base {full}/models/tiny {about}\n" in capsys.readouterr().err
        for step in (6, 8):
            name = f"checkpoints/step-{step:08d}"
            assert not _of_directories(runs["with"] / name, runs["without"] / name)
        assert replay(runs["without"], 5, 8)["identical"]
        made = branch(f"{runs['without']}@6", tmp_path / "branch", Choices(), is_quiet=True)
        for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json", "config.json"):
            path = f"checkpoints/step-00000008/{name}"
            assert (made / path).read_bytes() == (runs["with"] / path).read_bytes()
        with pytest.raises(BaseError, match="is not here any more"):
            replay(runs["without"], 1, 2)
        for path in runs["without"].glob("checkpoints/*"):
            shutil.rmtree(path)
        with pytest.raises(BaseError, match="is not here any more"):
            train(recipe, runs["without"], is_quiet=True)
    finally:
        (full / "elsewhere").rename(full / "models")
        extended(full / "recipe.yaml", 4)


@pytest.mark.slow
def test_a_base_that_is_a_checkpoint_of_a_run_is_found_after_both_were_moved(full, tmp_path, chat_data) -> None:
    shutil.copytree(full / "runs/a", tmp_path / "old/runs/a")
    recipe = yaml.safe_load((full / "recipe.yaml").read_text())
    recipe["base"]["checkpoint"], recipe["adapter"] = f"{tmp_path}/old/runs/a@4", ADAPTER
    (tmp_path / "old/recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(tmp_path / "old/recipe.yaml"), tmp_path / "old/runs/b", is_quiet=True)
    (tmp_path / "old").rename(tmp_path / "new")
    assert generate([f"{tmp_path}/new/runs/b@4"], ASKED, Settings(max_new_tokens=4))
    (tmp_path / "new/runs/a").rename(tmp_path / "first")
    with pytest.raises(BaseError, match="a@4: is not here any more"):
        generate([f"{tmp_path}/new/runs/b@4"], ASKED, Settings(max_new_tokens=4))
    with places.named([f"{tmp_path}/first@4"], {}):
        assert generate([f"{tmp_path}/new/runs/b@4"], ASKED, Settings(max_new_tokens=4))


@pytest.mark.slow
def test_a_base_on_the_hub_may_be_another_repository_at_the_same_commit_or_a_folder_that_is_said_not_to_be_compared(
    hub, online, base, recipe_file, tmp_path
) -> None:
    recipe, run = recipe_file(base={"checkpoint": "tiny/base"}, train={"steps": 1, "batch_size": 6}), tmp_path / "run"
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes(base.at("main").files[name].content)
    hub.repos["model", "tiny/mirror"] = copy.copy(base)
    ask = ("generate", f"{run}@1", "--prompt", "the model", "--max-new-tokens", "4")
    (code, _, said), (_, first, _), (mirrored, second, told) = in_turn(
        online, ("train", recipe, "--run", run, "--quiet"), ask, (*ask, "--base", "tiny/mirror")
    )
    assert code == 0, said
    assert mirrored == 0 and second == first and "base tiny/base is now tiny/mirror: equal content" in told
    hub.repos.clear()
    nowhere = online | {"HF_HOME": str(tmp_path / "empty")}
    (code, _, gone), (copied, third, about) = in_turn(nowhere, ask, (*ask, "--base", folder))
    assert code == 1 and "Traceback" not in gone
    assert copied == 0 and third == first, about
    assert "its commit is recorded and no digest, so equal content is not checked" in about


def test_a_folder_with_a_letter_wrong_is_not_only_a_hub_that_cannot_be_reached(
    tmp_path, tiny_base, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "models/tiny")
    for text in ("models/tinny", "model/tiny", "./models/tny", f"{tmp_path}/models/tinny"):
        with pytest.raises((BaseError, CheckpointError)) as caught:
            pin(Base(checkpoint=text))
        assert caught.value.hint.startswith("did you mean") and "models/tiny`" in caught.value.hint, text
    with pytest.raises(BaseError) as caught:
        pin(Base(checkpoint="models/tinny"))
    assert caught.value.message.startswith("is no folder here, and as a Hub id: the Hub cannot be reached")
    with pytest.raises(BaseError, match="the Hub cannot be reached"):
        pin(Base(checkpoint="owner/name"))
