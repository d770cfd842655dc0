"""`plan` refuses what `train` refuses, in the same words, before a weight is read."""

import json
import shutil
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.errors import FinetuneError
from finetune.recipe.load import load

needs_none = pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
LORA = {"name": "lora", "rank": 4}


def cut(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(base):
    (base / "model.safetensors").unlink()


def without_a_shard(base):
    names = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def with_another_shape(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def with_one_layer_more(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def refused(train, recipe, run) -> str:
    """What both say."""
    result = CliRunner().invoke(cli, ["plan", str(recipe), "--run", str(run), "--json"])
    with pytest.raises(FinetuneError) as caught:
        train(recipe, run)
    assert isinstance(result.exception, FinetuneError), result.output
    assert str(result.exception) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "its model.safetensors is damaged"),
        (without_weights, "has no safetensors weights"),
        (without_a_shard, "lacks its weight file model-00002-of-00002.safetensors"),
        (with_another_shape, "lacks weights of its own config (mismatched keys)"),
        (with_one_layer_more, "lacks weights of its own config (missing keys)"),
    ],
)
def test_a_base_with_cut_or_missing_weights(damage, message, tiny_base, recipe_file, train, tmp_path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "copied")
    damage(base)
    assert message in refused(train, recipe_file(base={"checkpoint": str(base)}), tmp_path / "run")


@needs_none
def test_quantization_without_bitsandbytes(recipe_file, train, tiny_base, tmp_path) -> None:
    recipe = recipe_file(base={"checkpoint": str(tiny_base), "quantization": "nf4"}, adapter=LORA)
    assert "`nf4` weights need bitsandbytes\nhint: pip install" in refused(train, recipe, tmp_path / "run")


@needs_none
def test_an_8_bit_optimizer_without_bitsandbytes(recipe_file, train, tmp_path) -> None:
    recipe = recipe_file(optimizer={"name": "adamw_8bit", "learning_rate": 0.01})
    assert "8-bit optimizers need bitsandbytes" in refused(train, recipe, tmp_path / "run")


def test_compiled_layers_without_a_compiler(recipe_file, train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    settings = {"steps": 2, "batch_size": 6, "compile": True, "reproducibility": "fast"}
    assert "there is no C++ compiler" in refused(train, recipe_file(train=settings), tmp_path / "run")


def test_a_run_directory_that_is_a_file(recipe_file, tmp_path) -> None:
    (tmp_path / "run").write_text("")
    result = CliRunner().invoke(cli, ["plan", str(recipe_file()), "--run", str(tmp_path / "run/inner"), "--json"])
    assert "is a file, not a directory" in str(result.exception)


def test_a_recipe_that_can_be_trained_is_refused_by_neither(recipe_file, tmp_path) -> None:
    assert load(recipe_file(), ()).recipe
    result = CliRunner().invoke(cli, ["plan", str(recipe_file()), "--run", str(tmp_path / "run"), "--json"])
    assert result.exception is None, result.exception
