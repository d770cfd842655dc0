"""What FSDP holds at once is forecast: held against the tensors of a real step of one of 8 ranks."""

import json
import sys
from pathlib import Path

import pytest

from finetune.model import base as bases
from finetune.plan import strategy
from finetune.plan.memory import Device, Work
from finetune.plan.shape import shape_of
from finetune.recipe.load import load
from finetune.training.resolve import resolve
from tests import forks

pytestmark = pytest.mark.slow
RANKS, TOKENS, LAYERS = 8, 128, 8
STEP = Path(__file__).with_name("gathered_step.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer) -> Path:
    """Config and tokenizer of a model whose weights are more than its activations."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("gathered")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=2048, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def held(base, recipe_file):
    """A function that gives the forecast of a step, without what is no tensor of the training, and the bytes of its tensors."""

    def held(adapter: dict | None = None, **train: object) -> tuple[dict[str, int], int]:
        train = {"steps": 4, "batch_size": 64, "precision": "bf16", "strategy": "fsdp"} | train
        recipe = recipe_file(base={"checkpoint": str(base)}, adapter=adapter, train=train)
        plan = resolve(load(recipe)).plan
        device = Device(2**40, is_gpu=True, world_size=RANKS, processes=RANKS)
        shape = shape_of(bases.load_config(base))
        found = strategy.sharded_parts(plan, shape, Work(TOKENS, 64 * TOKENS), device)
        # neither an optimizer's state nor libraries are in the step that is watched
        parts = {name: size for name, size in found.items() if name not in ("process", "moments", "slack")}
        command = [sys.executable, STEP, recipe, RANKS, TOKENS]
        result = forks.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return parts, json.loads(result.stdout)["peak"]

    return held


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        (None, {}),
        (None, {"activation_checkpointing": True}),
        (None, {"weights": "bf16", "activation_checkpointing": True}),
        (None, {"precision": "fp32"}),
        ({"name": "lora"}, {"weights": "bf16"}),
    ],
)
def test_what_is_whole_for_a_while_is_forecast_within_a_quarter_and_never_too_low(held, adapter, train):
    parts, peak = held(adapter, **train)
    assert 0.98 <= sum(parts.values()) / peak <= 1.25, parts


def test_checkpointed_layers_keep_no_casts(held):
    """Autocast's cache held a bf16 copy of the whole model on every rank, until the end of the forward pass."""
    checkpointed, peak = held(activation_checkpointing=True)
    plain, _ = held()
    assert plain["casts"] == LAYERS * checkpointed["casts"]
    whole = plain["casts"] - checkpointed["casts"]
    assert peak < sum(checkpointed.values()) * 1.02 < sum(checkpointed.values()) + whole
