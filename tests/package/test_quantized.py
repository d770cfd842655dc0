"""What was trained on a quantized base is packaged on the base itself, and how far that moves the model is said."""

import json
from importlib.util import find_spec

import pytest
import torch

from finetune.package.export import package
from finetune.store.run import journal
from finetune.training.opened import open_model

pytestmark = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")


@pytest.fixture(params=["nf4", "int8"])
def run(request, recipe_file, tiny_sections, train, tmp_path):
    base = tiny_sections["base"] | {"quantization": request.param}
    return train(recipe_file(base=base, train={"steps": 4, "batch_size": 6, "precision": "fp32"}), tmp_path / "run")


def test_the_package_lies_on_the_base_itself_and_the_drift_is_a_check(run, tmp_path):
    checks = {check["name"]: check for check in package(f"{run}@last", tmp_path / "package")["checks"]}
    assert 0 < checks["quantization"]["mean_kl"] <= checks["quantization"]["bound"]
    assert checks["merge"]["mean_kl"] < 1e-9
    assert "quantization_config" not in json.loads((tmp_path / "package/config.json").read_bytes())


def test_a_checkpoint_is_opened_on_the_base_that_it_was_trained_on(run):
    trained, plain = open_model(f"{run}@last"), open_model(f"{run}@last", is_as_trained=False)
    tokens = torch.arange(2, 34)[None]
    with torch.inference_mode():
        assert not torch.equal(trained.model(tokens).logits, plain.model(tokens).logits)
    dtypes = {parameter.dtype for parameter in trained.model.parameters()}
    assert len(dtypes) == 2 and dtypes < {torch.float32, torch.uint8, torch.int8}


def test_a_checkpoint_holds_the_adapter_alone(run):
    names = {path.name for path in (run / "checkpoints/step-00000004").iterdir()}
    assert "adapter_model.safetensors" in names and not any(name.startswith("model") for name in names)
    assert journal.steps(journal.read(run)).keys() == {1, 2, 3, 4}
