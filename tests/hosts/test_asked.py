"""What Accelerate's settings ask for is taken where the recipe agrees, and refused with both values where not."""

import pytest

from finetune.errors import FinetuneError
from finetune.hosts import asked
from finetune.recipe.schema import Train

SETTINGS = {"steps": 1}
# what `accelerate launch --use_fsdp --fsdp_version 2` sets
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.mark.parametrize(
    "variable",
    ["ACCELERATE_USE_DEEPSPEED=1", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"],
)
def test_what_accelerate_would_do_beside_the_recipe_is_refused(variable):
    name, value = variable.split("=")
    with pytest.raises(FinetuneError, match="Accelerate is set to use") as caught:
        asked.take(Train(**SETTINGS), {name: value})
    assert f"unset {name}" in caught.value.hint


def test_what_accelerate_sets_where_nothing_is_asked_of_it_changes_nothing():
    names = {"DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1", "USE_FSDP": "false"}
    environment = {f"ACCELERATE_{name}": value for name, value in names.items()}
    asked.take(Train(**SETTINGS), environment)
    assert asked.ASKED not in environment


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_wish_for_fsdp_that_agrees_is_taken_out_of_accelerates_sight(strategy):
    environment = dict(LAUNCHED)
    asked.take(Train(**SETTINGS, strategy=strategy), environment)
    assert environment[asked.ASKED] == "fsdp"
    assert "ACCELERATE_USE_FSDP" not in environment, "transformers would load the weights on rank 0 alone"


def test_every_value_that_says_something_else_is_refused_with_both():
    changed = {
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }
    with pytest.raises(FinetuneError) as caught:
        asked.take(Train(**SETTINGS, strategy="ddp"), LAUNCHED | changed)
    assert caught.value.message.splitlines()[1:] == [
        "  ACCELERATE_USE_FSDP is true, and train.strategy is ddp",
        "  FSDP_RESHARD_AFTER_FORWARD is false, and finetune shards weights again after each forward",
        "  FSDP_OFFLOAD_PARAMS is true, and finetune keeps its rows on the device",
        "  FSDP_AUTO_WRAP_POLICY is SIZE_BASED_WRAP, and finetune shards by decoder layer",
        "  FSDP_ACTIVATION_CHECKPOINTING is true, and train.activation_checkpointing is false",
    ]
