"""A run that was planned on a GPU sums in its way wherever it goes on, learns the same, and resumes to the bit."""

import json
import shutil

import pytest

from finetune.plan import on_device
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory

FILES = ("optimizer.safetensors", "adapter_model.safetensors", "model.safetensors")
TRAIN = {"steps": 10, "batch_size": 6, "precision": "bf16", "micro_batch_tokens": 64}
ADAPTER = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}


def losses(run):
    return [record["loss"] for record in journal.read(run) if record["kind"] == "step"]


def contents(run):
    last = run / "checkpoints/step-00000010"
    return {name: (last / name).read_bytes() for name in FILES if (last / name).exists()}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [ADAPTER, None])
def test_it_learns_as_on_a_cpu_and_a_resume_of_it_gives_the_same_bits(
    recipe_file, train, tmp_path, monkeypatch, adapter
):
    recipe = recipe_file(adapter=adapter, train=TRAIN | ({"weights": "bf16"} if adapter else {}))
    plain = train(recipe, tmp_path / "cpu")
    monkeypatch.setattr(on_device, "has_gpu_sums", lambda like, is_gpu: True)
    run = train(recipe, tmp_path / "gpu")
    monkeypatch.undo()
    assert RunDirectory(run).plan()[0].gpu_sums and "gpu_sums" not in json.loads((plain / "plan.json").read_text())
    # so few tokens are one chunk in both ways
    assert (losses(run) == losses(plain)) == (adapter is None)
    # dropout is drawn for numbers in bf16, so masks differ
    assert losses(run) == pytest.approx(losses(plain), rel=0.05 if adapter else 0.002)
    whole = contents(run)
    assert len(whole) == 2
    shutil.rmtree(run / "checkpoints/step-00000010")
    assert contents(train(recipe, run)) == whole
