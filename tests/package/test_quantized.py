"""What was trained on a quantized base is packaged on the base itself, and how far that moves the model is said."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

from finetune.package import proof
from finetune.package.export import package
from finetune.package.verify.verify import verify
from finetune.store.run import journal
from finetune.training.opened import open_model
from tests.model.quantizing import in_bits
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Killed, killed

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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("nf4", "merged"), ("int8", "adapter")])
def test_weights_that_stay_as_stored_are_resumed_evaluated_and_packaged(
    kind, form, recipe_file, train, tiny_base, tmp_path
):
    small = in_bits(tiny_base, tmp_path / "small", kind)
    settings = {"steps": 4, "batch_size": 6, "precision": "fp32"}
    named = {"checkpoint": str(small), "origin": "owner/small"}
    written = recipe_file(base=named, train=settings, package={"form": form})
    run = train(written, tmp_path / "run")
    with killed(after=3), pytest.raises(Killed):
        train(written, tmp_path / "interrupted")
    assert_same_run(run, train(written, tmp_path / "interrupted"))
    with safe_open(small / "model.safetensors", "pt") as files:
        weight = open_model(f"{run}@last").model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight
        assert torch.equal(weight, files.get_tensor("model.layers.0.mlp.up_proj.weight"))
    packaged = package(f"{run}@last", tmp_path / "package", load=proof.load_here)
    checks = {check["name"]: check for check in packaged["checks"]}
    assert checks["quantization"]["mean_kl"] < 1e-4, "they are the same numbers, rounded in other places"
    assert "in place of the quantized weights under the adapter" in checks["quantization"]["message"]
    under = {"merged": f"the dequantized weights (bitsandbytes, {kind}) of owner/small with the digest blake3:"}
    under["adapter"] = "the weights of owner/small with the digest blake3:"
    said = verify(str(tmp_path / "package"))["lies_on"]
    assert said.startswith(under[form]) and checks["base"]["message"] == f"it lies on {said}"
    assert said.endswith(f"as its files store them (bitsandbytes, {kind})") == (form == "adapter")
    card = (tmp_path / "package/README.md").read_text()
    assert f"It lies on {said}" in card and ("not the files themselves" in card) == (form == "merged")


def test_a_checkpoint_holds_the_adapter_alone(run):
    names = {path.name for path in (run / "checkpoints/step-00000004").iterdir()}
    assert "adapter_model.safetensors" in names and not any(name.startswith("model") for name in names)
    assert journal.steps(journal.read(run)).keys() == {1, 2, 3, 4}
