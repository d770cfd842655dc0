"""What saves memory changes neither the resume, which stays exact to the bit, nor more of the losses than it says."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.compare.evaluate import evaluate
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.tensors import read_header
from finetune.training.preview import preview
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Killed, Workers, killed

NEEDS_BITSANDBYTES = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
LORA = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
TRAIN = {"steps": 5, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
SAVERS = {
    "checkpointed-full": {"adapter": None, "train": {"activation_checkpointing": True}},
    "checkpointed-lora": {"adapter": LORA, "train": {"activation_checkpointing": True}},
    "offloaded-full": {"adapter": None, "train": {"activation_checkpointing": True, "activation_offload": True}},
    "pieces-full": {"adapter": None, "train": {"activation_checkpointing": True, "mlp_chunk_tokens": 16}},
    "pieces-lora": {"adapter": LORA, "train": {"mlp_chunk_tokens": 16}},
    "bf16-weights-full": {"adapter": None, "train": {"precision": "bf16", "weights": "bf16"}},
    "bf16-weights-lora": {"adapter": LORA, "train": {"precision": "bf16", "weights": "bf16"}},
    "8bit-full": {"adapter": None, "optimizer": {"learning_rate": 0.01, "name": "adamw_8bit"}},
    "nf4": {"adapter": LORA, "base": {"quantization": "nf4"}},
    "int8": {"adapter": LORA, "base": {"quantization": "int8"}},
    "int8-bf16": {
        "adapter": LORA,
        "base": {"quantization": "int8"},
        "train": {"precision": "bf16", "weights": "bf16"},
    },
    "all-at-once": {
        "adapter": LORA,
        "base": {"quantization": "nf4"},
        "optimizer": {"learning_rate": 0.01, "name": "adamw_8bit"},
        "train": {"precision": "bf16", "weights": "bf16", "activation_checkpointing": True},
    },
}
NEED = {name for name in SAVERS if "8bit" in name or "nf4" in name or "int8" in name or name == "all-at-once"}
EVERY = [pytest.param(name, marks=NEEDS_BITSANDBYTES if name in NEED else ()) for name in SAVERS]


@pytest.fixture(scope="module")
def wide_base(tiny_base, tmp_path_factory):
    """The tiny base with matrices of 8,192 values: those of fewer than 4,096 keep their moments in fp32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("wide") / "base"
    config = LlamaConfig.from_pretrained(tiny_base)
    config.intermediate_size, config.attention_dropout = 256, 0.1
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(directory)
    return directory


@pytest.fixture
def write_recipe(recipe_file, wide_base):
    """A function that writes the recipe with a saver's settings, evaluated and saved every two steps."""

    def write(name: str, **savers: dict) -> str:
        sections = savers | {
            "base": {"checkpoint": str(wide_base)} | savers.get("base", {}),
            "train": TRAIN | savers.get("train", {}),
            "evaluate": {"every": "2 steps"},
            "checkpoint": {"every": "2 steps"},
        }
        return recipe_file(name, **sections)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_equals_an_uninterrupted_one(name, write_recipe, train, train_once, tmp_path):
    recipe = write_recipe(name, **SAVERS[name])
    whole = train_once(recipe, tmp_path / "run")
    with killed(after=3), pytest.raises(Killed):
        train(recipe, tmp_path / "interrupted")
    assert_same_run(whole, train(recipe, tmp_path / "interrupted"))
    assert [record["step"] for record in journal.read(tmp_path / "interrupted") if record.get("event") == "started"][-1]


@NEEDS_BITSANDBYTES
def test_checkpoints_hold_moments_in_8_bits(write_recipe, train_once, tmp_path):
    run = train_once(write_recipe("8bit", **SAVERS["8bit-full"]), tmp_path / "run")
    moments = load_file(run / "checkpoints/step-00000005/optimizer.safetensors")
    assert moments["model.layers.0.mlp.up_proj.weight.exp_avg"].dtype == np.uint8
    assert moments["model.layers.0.mlp.up_proj.weight.exp_avg_scale"].shape == (32,)
    assert moments["model.embed_tokens.weight.exp_avg"].dtype == np.float32


@pytest.mark.slow
def test_checkpoints_of_bf16_weights_say_so_and_have_fp32_moments(write_recipe, train_once, tmp_path):
    run = train_once(write_recipe("bf16", **SAVERS["bf16-weights-full"]), tmp_path / "run")
    checkpoint = run / "checkpoints/step-00000005"
    assert json.loads((checkpoint / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert {place.dtype for place in read_header(checkpoint / "model.safetensors").values()} == {"BF16"}
    assert {place.dtype for place in read_header(checkpoint / "optimizer.safetensors").values()} == {"F32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16-weights-full", "bf16-weights-lora"])
def test_a_checkpoint_of_bf16_weights_is_evaluated_as_it_was_in_training(name, write_recipe, train_once, tmp_path):
    run = train_once(write_recipe(name, **SAVERS[name]), tmp_path / "run")
    recorded = journal.evaluations(journal.read(run))[5]
    (found,) = evaluate([f"{run}@5"], None, (), is_again=True)
    assert found["metrics"]["loss"] == recorded["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_checkpointed_activations_give_the_same_run_to_the_bit(adapter, write_recipe, train_once, tmp_path):
    plain = train_once(write_recipe("plain", adapter=adapter), tmp_path / "plain")
    saver = train_once(
        write_recipe("saver", adapter=adapter, train={"activation_checkpointing": True}), tmp_path / "run"
    )
    assert_same_run(plain, saver)


@pytest.mark.slow
def test_offloaded_activations_give_the_same_run_to_the_bit(write_recipe, train_once, tmp_path):
    plain = train_once(write_recipe("plain", adapter=None), tmp_path / "plain")
    saver = train_once(write_recipe("offloaded-full", **SAVERS["offloaded-full"]), tmp_path / "run")
    assert_same_run(plain, saver)


@pytest.mark.slow
def test_a_feed_forward_in_pieces_trains_the_same_to_float_tolerance(write_recipe, train_once, tmp_path):
    plain = train_once(write_recipe("plain", adapter=None), tmp_path / "plain")
    pieces = train_once(write_recipe("pieces-full", **SAVERS["pieces-full"]), tmp_path / "run")
    assert losses(pieces) == pytest.approx(losses(plain), rel=1e-4)


def test_offload_is_said_to_do_nothing_on_a_cpu(write_recipe, tmp_path):
    loaded = load(write_recipe("offloaded-full", **SAVERS["offloaded-full"]))
    notes = preview(loaded, tmp_path / "run", lambda resolved: None).facts["notes"]
    assert any(note.startswith("train.activation_offload moves nothing: ") for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpointed-full", "checkpointed-lora", "bf16-weights-full", "pieces-full"])
def test_two_processes_resume_exactly(name, write_recipe, train, tmp_path):
    recipe, workers = write_recipe(name, **SAVERS[name]), Workers(2, tmp_path)
    try:
        assert workers.train(recipe, tmp_path / "two") == "finished"
        assert workers.train(recipe, tmp_path / "interrupted", killed_after=3) == "killed"
        assert workers.train(recipe, tmp_path / "interrupted") == "finished"
    finally:
        workers.close()
    assert_same_run(tmp_path / "two", tmp_path / "interrupted")


@pytest.mark.parametrize(
    "name", [each for each in EVERY if not each.values[0].startswith(("checkpointed", "offloaded"))]
)
def test_a_saver_learns_what_plain_training_learns(name, write_recipe, train_once, tmp_path):
    saver = SAVERS[name]
    plain = losses(train_once(write_recipe("plain", adapter=saver["adapter"]), tmp_path / "plain"))
    saved = losses(train_once(write_recipe("saver", **saver), tmp_path / "run"))
    assert saved == pytest.approx(plain, rel=0.05) and saved != plain
    assert saved[-1] < saved[0]


def losses(run) -> list[float]:
    steps = journal.steps(journal.read(run))
    return [steps[step]["loss"] for step in sorted(steps)]
