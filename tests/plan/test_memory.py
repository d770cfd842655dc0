"""What a training holds in memory is forecast part by part, for this machine and for others, and `auto` keeps within it."""

import json
import shutil
import sys
from itertools import product
from subprocess import PIPE, Popen

import pytest
from transformers import AutoConfig

from finetune.errors import FinetuneError
from finetune.model import base, losses
from finetune.plan import activations, forecast, forecast_table, memory, strategy
from finetune.plan.kinds import OfKind, shaped
from finetune.plan.memory import Device, Work
from finetune.plan.shape import Shape, shape_of
from finetune.recipe.load import load
from finetune.training.build import slow_numbers
from finetune.training.preview import preview
from finetune.training.resolve import resolve
from tests.lengths import length

CARD = Device(80 * 2**30, is_gpu=True)
LARGE = {
    "8B": Shape(32, 4096, 14336, 128256, 4096, 1024, False),
    "70B": Shape(80, 8192, 28672, 128256, 8192, 1024, False),
}
# Forks for each line of arguments a `finetune train` that tells its peak at the end. Of the parent it has what every training imports.
PEAK = """
import json, os, re, sys
import finetune.training.run, peft, transformers.models.llama.modeling_llama
from finetune.cli import main
for line in sys.stdin:
    if process := os.fork():
        os.waitpid(process, 0)
        continue
    sys.argv = ["finetune", *json.loads(line)]
    main()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]), flush=True)
    os._exit(0)
"""


def llama(shape):
    """config.json of a Llama."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "num_attention_heads": shape.queries // 128,
        "num_key_value_heads": shape.keys // 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shape.is_tied,
    }


@pytest.fixture
def weightless(tmp_path, tiny_tokenizer):
    """A function that makes a base of config and tokenizer alone."""

    def make(shape):
        directory = tmp_path / "weightless"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(llama(shape)))
        tiny_tokenizer.save_pretrained(directory)
        return {"checkpoint": str(directory)}

    return make


@pytest.fixture
def planned(recipe_file):
    """A function that makes a plan and its model's shape."""

    def plan(**sections):
        resolved = resolve(load(recipe_file(**{"train": {"steps": 4, "batch_size": 6}} | sections)))
        return resolved.plan, shape_of(base.load_config(resolved.base_directory))

    return plan


def on_devices(plan, shape):
    rows = forecast.on_devices(plan, shape, Work(2048, 16384), CARD.bytes)
    return {row["devices"]: row for row in rows}


def test_chunks_of_logits_are_as_long_as_those_of_the_loss():
    assert memory.CHUNK_TOKENS == losses.CHUNK_TOKENS
    assert memory.LARGE_CHUNK_TOKENS == losses.LARGE_CHUNK_TOKENS


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mamba2", Shape(64, 4096, 16384, 32768, 8192, 8192, False)),
        ("falcon_mamba", Shape(32, 768, 1536, 50280, 768, 768, True)),
        ("rwkv", Shape(32, 4096, 16384, 50277, 4096, 4096, False)),
        ("xlstm", Shape(32, 4096, 16384, 50304, 4096, 4096, False)),
        ("gemma3n_text", Shape(35, 2048, 16384, 262400, 2048, 512, True)),  # a size for each layer
        ("gemma4_text", Shape(30, 2304, 9216, 262144, 4096, 2048, True)),  # layers that differ
    ],
)
def test_a_shape_is_found_in_configs_without_attention_and_in_those_whose_layers_differ(kind, shape):
    assert shape_of(AutoConfig.for_model(kind)) == shape


@pytest.mark.parametrize(("name", "parameters", "fits_from"), [("8B", 8_030_261_248, 8), ("70B", 70_553_706_496, None)])
def test_a_large_model_is_forecast_for_many_devices_without_its_weights(
    weightless, planned, name, parameters, fits_from
):
    plan, shape = planned(base=weightless(LARGE[name]), adapter=None)
    assert (shape, plan.trainable_parameters) == (LARGE[name], parameters)
    rows = on_devices(plan, shape)
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64]
    assert rows[1]["replicated_bytes"] == rows[1]["sharded_bytes"] > 16 * parameters
    shared = [row["sharded_bytes"] for row in rows.values()]
    assert shared == sorted(shared, reverse=True)
    # of every further device a share of weights, gradients and moments is taken off, and nothing else
    assert rows[32]["sharded_bytes"] - rows[64]["sharded_bytes"] == pytest.approx(16 * parameters / 64, rel=1e-3)
    assert not any(row["replicated_fits"] for row in rows.values())
    assert [count for count, row in rows.items() if row["sharded_fits"]] == [
        count for count in rows if fits_from and count >= fits_from
    ]


@pytest.mark.slow
def test_lora_fits_one_card_where_all_weights_need_eight(weightless, planned):
    plan, shape = planned(base=weightless(LARGE["8B"]), adapter={"name": "lora"})
    assert on_devices(plan, shape)[1]["replicated_fits"]


@pytest.mark.slow
def test_the_table_shows_each_number_of_devices(recipe_file, weightless, finetune):
    recipe = recipe_file(base=weightless(LARGE["8B"]), adapter=None)
    result = finetune("plan", recipe, "--devices", "--device-memory", 48)
    assert result.returncode == 0, result.stderr  # a disk too small for it here is no reason to refuse
    heading, names, *rows = result.stdout.partition("\n\n")[2].splitlines()
    assert heading == "devices    memory a device at 128 tokens a micro-batch, of 48.0 GiB each"
    assert names.split() == ["replicated", "sharded", "fits"]
    assert [line.split()[0] for line in rows] == ["1", "2", "4", "8", "16", "32", "64"]
    assert rows[0].split()[3:7:3] == ["-", "-"] and rows[-1].split()[3:7:3] == ["-", "fits"]
    assert rows[0].endswith("not a row") and rows[-1].endswith("fsdp, 352 tokens")


@pytest.mark.slow
def test_the_table_says_what_fits_and_that_packed_bits_are_not_shared(weightless, planned):
    base, train = weightless(LARGE["70B"]), {"steps": 4, "batch_size": 64, "activation_checkpointing": True}
    plan, shape = planned(base=base, adapter=None, train=train | {"weights": "bf16"})
    rows = on_devices(plan, shape)
    assert [(row["strategy"], row["micro_batch_tokens"] is not None) for row in rows.values()] == [
        *(("ddp", False), ("fsdp", False), ("fsdp", False), ("fsdp", False)),
        *(("fsdp", True), ("fsdp", True), ("fsdp", True)),
    ]
    tokens = [row["micro_batch_tokens"] for row in rows.values() if row["micro_batch_tokens"]]
    assert tokens == sorted(tokens) and tokens[-1] > tokens[0]
    plan, shape = planned(base=base, adapter=None, train=train | {"strategy": "hsdp"})
    assert not any(row["micro_batch_tokens"] for row in on_devices(plan, shape).values())  # of 8, however many hosts
    plan, shape = planned(
        base=base | {"quantization": "nf4"}, adapter={"name": "lora"}, train=train | {"weights": "bf16"}
    )
    rows = on_devices(plan, shape)
    assert [row["sharded_bytes"] is None for row in rows.values()] == [False, *[True] * 6]
    assert rows[8]["strategy"] == "ddp" and rows[8]["replicated_fits"] and not rows[8]["sharded_fits"]


@pytest.mark.parametrize(("adapter", "fewer"), [(None, 16), ({"name": "lora", "rank": 2, "alpha": 4}, 8)])
def test_fused_kernels_keep_less_of_a_layer(planned, adapter, fewer):
    """Of a gated layer one tensor less; norms keep their inputs, and outputs in bf16 that products share: 12 bytes of 28, or of 20."""
    plan, shape = planned(adapter=adapter, train={"steps": 4, "batch_size": 6, "precision": "bf16"})
    fused = shape._replace(has_fused_norms=True, has_fused_feed_forward=True)
    less = activations.running(plan, shape) - activations.running(plan, fused)
    assert less == fewer * shape.hidden + 2 * shape.intermediate


def test_scores_that_no_fused_kernel_computes_are_in_memory(planned):
    """As traced over fake CUDA tensors: of 8 heads with sinks and rows of 4,096 tokens, three copies in a layer that runs."""
    train = {"steps": 4, "batch_size": 64, "precision": "bf16", "activation_checkpointing": True}
    (plan, shape), (whole, _) = planned(train=train), planned(train=train | {"activation_checkpointing": False})
    plan, whole = (
        each.model_copy(update={"counts": each.counts.model_copy(update={"longest": 4096})}) for each in (plan, whole)
    )

    def activations(plan, **fields):
        found = shape._replace(**fields)
        return memory.step_parts(plan, found, Work(8192, 2**20), CARD)["activations"]

    a_copy = 8 * 8192 * 4096 * 2
    assert activations(plan, scored=8) - activations(plan) == 3 * a_copy
    assert activations(plan, scored=8, is_capped=True) - activations(plan) == 5 * a_copy
    assert activations(whole, scored=8) - activations(whole) == (2 * shape.layers + 1) * a_copy


def test_sinks_and_soft_caps_are_found():
    gemma2 = shape_of(AutoConfig.for_model("gemma2"))
    assert (gemma2.scored, gemma2.is_capped) == (8, True)
    assert shape_of(AutoConfig.for_model("gemma3_text")).scored == 0
    sinks = OfKind(parameters=24 * 64, trained=0, under_adapter=0, summed=0, linear=0)
    assert shaped(shape_of(AutoConfig.for_model("gpt_oss", num_hidden_layers=24)), {"sinks": sinks}).scored == 64


def test_the_parts_add_up_and_say_what_each_setting_costs(planned):
    work, here = Work(1024, 4096), Device(2**34)
    plan, shape = planned(adapter=None)
    bf16 = memory.parts(plan, shape, work, here)
    fp32 = memory.parts(planned(adapter=None, train={"steps": 4, "precision": "fp32"})[0], shape, work, here)
    lora = memory.parts(planned(adapter={"name": "lora"})[0], shape, work, here)
    assert bf16["moments"] == 2 * bf16["weights"] == 2 * bf16["gradients"]
    assert bf16["staging"] == bf16["weights"] + bf16["moments"]
    assert bf16["casts"] and not fp32["casts"] and fp32["activations"] > bf16["activations"]
    assert all(lora[name] < bf16[name] for name in ("moments", "gradients", "staging", "activations", "logits"))
    assert "staging" not in memory.parts(plan, shape, work, CARD)  # it is in the host's memory


@pytest.mark.slow
def test_products_of_a_quantized_base_are_as_wide_as_the_residual_stream(weightless, planned):
    """Held against tensors that a Llama of 4 layers keeps on a CPU: 3 of the 4 that a gated layer keeps are fp32 beside fp32 weights."""
    base, work = weightless(LARGE["8B"]), Work(8192, 16384)

    def activations(quantization, weights):
        sections = {"base": base | ({"quantization": "nf4"} if quantization else {}), "adapter": {"name": "lora"}}
        plan, shape = planned(**sections, train={"steps": 4, "weights": weights})
        return memory.parts(plan, shape, work, CARD)["activations"]

    wider = 3 * 14336 * 2 * 33 * 8192
    assert activations(True, "fp32") == activations(False, "fp32") + wider
    assert activations(True, "bf16") == activations(False, "bf16")
    assert activations(True, "fp32") == pytest.approx(76.5 * 2**30, rel=0.01)  # as traced over fake CUDA tensors


def test_products_of_int8_keep_their_input_beside_bf16_weights(weightless, planned):
    """As the memory of a process on a CPU grew: 5,128 bytes a token and layer more than nf4 at 512 hidden and 1,536 intermediate."""
    base, work = weightless(LARGE["8B"]), Work(8192, 16384)

    def parts(quantization, weights):
        sections = {"base": base | {"quantization": quantization}, "adapter": {"name": "lora"}}
        plan, shape = planned(**sections, train={"steps": 4, "weights": weights})
        return memory.parts(plan, shape, work, CARD)

    nf4, int8 = (parts(kind, "bf16") for kind in ("nf4", "int8"))
    assert int8["activations"] == nf4["activations"] + (2 * 4096 + 14336) * 2 * 33 * 8192
    assert parts("int8", "fp32")["activations"] == parts("nf4", "fp32")["activations"]
    assert 6 * 2**30 < int8["weights"] < 10 * 2**30 and nf4["weights"] < 0.7 * int8["weights"]


def test_an_update_of_weights_in_bf16_has_room_for_a_slice_on_a_gpu(weightless, planned):
    train = {"steps": 4, "weights": "bf16"}
    plan, shape = planned(base=weightless(LARGE["8B"]), adapter=None, train=train)
    assert memory.parts(plan, shape, Work(1024, 4096), CARD)["moments"] == 8 * plan.trainable_parameters + 14 * 2**26
    plan, shape = planned(adapter=None, train=train)  # its largest tensor is smaller
    for device, room in ((CARD, 14 * shape.vocabulary * shape.hidden), (Device(2**34), 0)):
        found = memory.parts(plan, shape, Work(128, 512), device)["moments"]
        assert found == 8 * plan.trainable_parameters + room


def test_the_host_of_a_gpu_holds_two_copies_of_the_state_or_one(weightless, planned):
    plan, shape = planned(base=weightless(LARGE["8B"]), adapter=None)
    work = Work(1024, 4096)
    state = memory.state_bytes(plan)
    room = 2 * state + memory.HOST_PROCESS_BYTES
    for host, sets in ((room / memory.MARGIN + 1, 2), (room / memory.MARGIN - 1, 1)):
        device = CARD._replace(host_bytes=host)
        assert memory.staging_sets(plan, device) == sets
        assert memory.host_parts(plan, shape, work, device) == {
            "process": memory.HOST_PROCESS_BYTES,
            "staging": sets * state,
        }
    assert memory.staging_sets(plan, Device(2**30)) == 2 and memory.host_parts(plan, shape, work, Device(2**30)) == {}


def test_the_table_says_what_the_host_of_a_gpu_holds(weightless, planned, tmp_path):
    plan, shape = planned(base=weightless(LARGE["8B"]), adapter=None)
    device = CARD._replace(host_bytes=64 * 2**30)
    facts = forecast.forecast(plan, shape, Work(2048, 4096), device, tmp_path, [plan.counts.tokens])
    lines = forecast_table.table(facts).splitlines()
    assert "host       about 93.7 GiB; there are 64.0 GiB" in lines
    assert lines[-1].startswith("warning: the host has less memory than saves need")


def test_the_plan_names_the_strategy_and_shows_its_memory(weightless, planned, tmp_path):
    base, work = weightless(LARGE["8B"]), Work(2048, 16384)
    shown = {}
    for name in ("auto", "ddp", "fsdp", "hsdp"):
        plan, shape = planned(base=base, adapter=None, train={"steps": 4, "strategy": name})
        for ranks in (1, 16):
            device = CARD._replace(world_size=ranks, processes=4)
            facts = forecast.forecast(plan, shape, work, device, tmp_path, [plan.counts.tokens])
            [line] = [line for line in forecast_table.table(facts).splitlines() if line.startswith("strategy")]
            shown[name, ranks] = line.removeprefix("strategy   "), facts["memory"]
    alone = "one device holds the whole model; on several"
    assert shown["auto", 1][0] == f"{alone} each does if it fits, else they share its rows (auto)"
    assert shown["ddp", 1][0] == f"{alone} each does (ddp)"
    assert shown["fsdp", 1][0] == f"{alone} they share its rows (fsdp)"
    assert shown["hsdp", 1][0] == f"{alone} those of each host share its rows (hsdp)"
    assert shown["ddp", 16][0] == "ddp: each of 16 devices holds the whole model"
    fsdp = "fsdp: 16 devices share the rows of weights, gradients and moments"
    assert shown["fsdp", 16][0] == shown["auto", 16][0] == fsdp
    assert shown["hsdp", 16][0].startswith("hsdp: of 16 devices those of each host share the rows")
    # of a share of 4 instead of 16
    assert shown["hsdp", 16][1]["weights"] == 4 * shown["fsdp", 16][1]["weights"] == shown["ddp", 16][1]["weights"] / 4
    assert shown["fsdp", 16][1]["gathered"] == shown["hsdp", 16][1]["gathered"] > 0


def test_gradients_take_the_place_of_activations_where_a_step_is_one_micro_batch(planned):
    plan, shape = planned(adapter=None)
    alone, several = (memory.parts(plan, shape, Work(1024, step), Device(2**34)) for step in (1024, 1025))
    assert alone["gradients"] < several["gradients"] == 4 * plan.trainable_parameters


def test_the_forecast_is_of_the_fuller_moment_a_step_or_an_evaluation_of_longer_rows(planned):
    plan, shape = planned(adapter=None)
    work, here = Work(64, 256), Device(2**34)
    large = shape._replace(vocabulary=150_000)
    assert memory.parts(plan, shape, work, here) == memory.step_parts(plan, shape, work, here)
    longer = plan.model_copy(
        update={
            "holdout_counts": plan.holdout_counts.model_copy(
                update={"longest": 512, "tokens": 4096, "supervised_tokens": 4096}
            )
        }
    )
    found = memory.parts(longer, large, work, here)
    assert found == memory.evaluation_parts(longer, large, work, here) and "gradients" not in found
    # a chunk of logits and their log-probabilities, bf16 products beside them, and the head's cast
    assert found["logits"] == 512 * 150_000 * (4 + 4 + 2) + 150_000 * shape.hidden * 2
    assert found["activations"] == 512 * activations.running(longer, large)
    assert found["staging"] == memory.step_parts(longer, large, work, here)["staging"]
    nothing_held_out = plan.holdout_counts.model_copy(update={"longest": 0, "tokens": 0, "supervised_tokens": 0})
    without = plan.model_copy(update={"holdout_counts": nothing_held_out})
    assert memory.evaluation_parts(without, large, work, here)["logits"] == 0


def test_a_row_longer_than_a_micro_batch_is_forecast_whole(planned):
    plan, shape = planned(adapter=None)
    longest, here = plan.counts.longest, Device(2**34)
    short, whole = (memory.step_parts(plan, shape, Work(tokens, 10_000), here) for tokens in (1, longest))
    assert short["activations"] == whole["activations"]


def test_auto_leaves_room_for_the_evaluation(planned):
    plan, shape = planned(train={"steps": 1, "batch_size": 10_000})
    counts = plan.holdout_counts.model_copy(update={"tokens": 10**6, "supervised_tokens": 10**6})
    held_out, large = plan.model_copy(update={"holdout_counts": counts}), shape._replace(vocabulary=10**6)
    device = Device(12 * 2**30, is_gpu=True)
    tokens = strategy.micro_batch_tokens(held_out, large, device)
    found = memory.parts(held_out, large, Work(tokens, 10_000 * plan.counts.longest), device)
    assert memory.fits(sum(found.values()), device)


def test_auto_is_the_longest_example_doubled_while_it_fits(planned):
    plan, shape = planned(train={"steps": 1, "batch_size": 10_000})
    longest, roomy = plan.counts.longest, Device(2**40, is_gpu=True)
    most = strategy.micro_batch_tokens(plan, shape, roomy)
    assert most // longest == 2 ** ((most // longest).bit_length() - 1) >= 10_000
    for size in (2**31, 3 * 2**30, 2**32):
        device = Device(size, is_gpu=True)
        tokens = strategy.micro_batch_tokens(plan, shape, device)
        held, next_ = (
            sum(memory.parts(plan, shape, Work(each, 10_000 * longest), device).values())
            for each in (tokens, 2 * tokens)
        )
        assert memory.fits(held, device) and (tokens == most or not memory.fits(next_, device))
    assert strategy.micro_batch_tokens(plan, shape, Device(1)) == longest
    assert strategy.micro_batch_tokens(plan, shape, Device(2**40)) <= memory.CPU_TOKENS


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (limit, tmp_path / "absent"))
    machine = memory.machine_bytes()
    limit.write_text("max\n")
    assert memory.machine_bytes() == machine > 2**28
    limit.write_text(f"{2**28}\n")
    assert memory.machine_bytes() == 2**28


def test_elastic_sums_take_the_gradients_of_all_ranks_slices_beside_the_buckets(planned):
    train = {"steps": 4, "batch_size": 6}
    (plain, shape), (elastic, _) = planned(train=train), planned(train=train | {"reproducibility": "elastic"})
    work, ranks = Work(64, 640), Device(2**40, world_size=4)
    found = [memory.step_parts(plan, shape, work, ranks)["gradients"] for plan in (plain, elastic)]
    assert found[1] - found[0] == 2.25 * memory.trained_bytes(plain)
    alone = [memory.step_parts(plan, shape, work, Device(2**40)) for plan in (plain, elastic)]
    assert alone[0] == alone[1]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"train": {"reproducibility": "elastic"}}, "`fsdp` adds gradients by rank"),
        (
            {"optimizer": {"name": "adamw_8bit", "learning_rate": 0.01}},
            "`fsdp` cannot spread the blocks of `adamw_8bit`",
        ),
        ({}, "`fsdp` cannot spread weights that stay as they are stored"),
    ],
)
def test_what_cannot_be_sharded_is_refused_where_the_launcher_asks_for_it(sections, why, planned):
    train = {"steps": 4, "batch_size": 6} | sections.get("train", {})
    plan, shape = planned(**sections | {"train": train})
    if not sections:
        plan = plan.model_copy(update={"base": plan.base.model_copy(update={"stored": "nf4"})})
    device = Device(2**40, world_size=2, asked="fsdp")
    with pytest.raises(FinetuneError) as caught:
        strategy.strategy(plan, shape, device)
    assert caught.value.where == "environment" and f"Accelerate is set to use FSDP: {why}" in caught.value.message
    assert strategy.strategy(plan, shape, device._replace(asked="")) == "ddp"


def test_offloaded_inputs_of_layers_are_on_the_host_of_a_gpu_and_nowhere_else_on_a_cpu(weightless, planned):
    base, work = weightless(LARGE["8B"]), Work(8192, 16384)
    device = CARD._replace(host_bytes=2**40)
    train = {"steps": 4, "activation_checkpointing": True}
    plan, shape = planned(base=base, adapter=None, train=train)
    moved, _ = planned(base=base, adapter=None, train=train | {"activation_offload": True})
    inputs = 8192 * 32 * 4096 * 4
    kept, left = (memory.step_parts(each, shape, work, device)["activations"] for each in (plan, moved))
    assert kept - left == inputs == memory.host_parts(moved, shape, work, device)["activations"]
    assert "activations" not in memory.host_parts(plan, shape, work, device)
    here = Device(2**40)
    assert memory.step_parts(moved, shape, work, here) == memory.step_parts(plan, shape, work, here)


def test_a_feed_forward_in_pieces_takes_its_wide_part_once_a_piece(planned):
    long, here = Work(131_072, 131_072), Device(2**40)
    one_b = Shape(16, 2048, 8192, 128_256, 2048, 512, True)
    train = {"steps": 4, "precision": "bf16", "activation_checkpointing": True}
    (whole, _), (pieces, _) = planned(train=train), planned(train=train | {"mlp_chunk_tokens": 4096})
    wide = 4 * 8192 * 2
    before, after = (memory.step_parts(plan, one_b, long, here)["activations"] for plan in (whole, pieces))
    assert before - after == 2 * (131_072 - 4096) * wide
    assert after < 0.7 * before
    with_experts = one_b._replace(experts=2)
    assert memory.step_parts(pieces, with_experts, long, here)["activations"] == before
    short = Work(4096, 4096)
    assert memory.step_parts(pieces, one_b, short, here) == memory.step_parts(whole, one_b, short, here)


def test_sums_of_a_gpu_share_the_inputs_of_lora_and_hold_larger_chunks_of_a_trained_head(planned):
    """As traced: 61.5 GiB for LoRA on 8B, 64.5 for 1.7B; `scripts/bench/traced.py` compares."""
    shape, tokens = LARGE["8B"], 8192
    train = {"steps": 4, "batch_size": 6, "precision": "bf16", "weights": "bf16"}
    lora, _ = planned(train=train)
    summed = lora.model_copy(update={"gpu_sums": True})
    saved = activations.running(lora, shape) - activations.running(summed, shape)
    assert saved == 3 * 2 * shape.hidden, "q, k and v share one input, gate and up another"
    full, _ = planned(adapter=None, train=train)
    for plan, rows in ((lora, memory.CHUNK_TOKENS), (full, memory.LARGE_CHUNK_TOKENS)):
        plan = plan.model_copy(update={"gpu_sums": True})
        head = shape.vocabulary * shape.hidden
        fixed = 0 if plan.recipe.adapter else 4 * head  # its gradient, in fp32
        found = memory.parts(plan, shape, Work(tokens, 2 * tokens), CARD)["logits"]
        share = plan.counts.supervised_tokens / plan.counts.tokens
        assert found == min(rows, round(share * tokens)) * shape.vocabulary * 10 + fixed


NEEDS_BF16 = pytest.mark.skipif(slow_numbers("bf16") is not None, reason="this CPU has no instructions for bf16")


@pytest.fixture(scope="module")
def peak_of():
    """A function that trains in a process that did nothing before, and returns its peak. One start is for all."""
    with Popen([sys.executable, "-c", PEAK], stdin=PIPE, stdout=PIPE, text=True) as process:

        def peak_of(*arguments: object) -> int:
            print(json.dumps([str(word) for word in arguments]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield peak_of
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        pytest.param(*cell, marks=NEEDS_BF16 if "bf16" in cell else ())
        for cell in length([("full", "fp32"), ("lora", "bf16")], list(product(("full", "lora"), ("bf16", "fp32"))))
    ],
)
def test_the_forecast_is_within_15_percent_of_a_real_trainings_peak(
    method, precision, recipe_file, tmp_path, tiny_tokenizer, peak_of
):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(8, 512, 1408, 16384, 512, 512, True)
    LlamaForCausalLM(LlamaConfig(**llama(shape))).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"text": "the model reads " * 400}) + "\n") * 8)
    recipe = recipe_file(
        base={"checkpoint": str(tmp_path / "base")},
        task={"name": "text", "max_length": 256},
        data={"train": [{"path": str(rows)}]},
        adapter={"name": "lora"} if method == "lora" else None,
        train={"steps": 2, "batch_size": 6, "precision": precision, "micro_batch_tokens": 768},
    )
    forecast = preview(load(recipe), tmp_path / "run", lambda resolved: None).facts["memory_bytes"]
    peak = peak_of("train", recipe, "--run", tmp_path / "run", "--quiet")
    assert forecast == pytest.approx(peak, rel=0.15)
