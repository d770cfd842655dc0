"""The peak memory of a training, by part: formulas over a plan and the shape of its model.

`scripts/bench/forecast.py` compares them with real trainings.
"""

import os
from pathlib import Path
from typing import NamedTuple

from finetune.plan import activations
from finetune.plan.activations import FLOAT, average_bytes, is_beside, stored_width, width
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape

# Bytes a parameter. nf4 and fp4: 4 bits, and an fp32 scale for every 64; int8: a byte, and an fp32 scale for every row, of 1,024 and more.
QUANTIZED = {"nf4": 0.5625, "fp4": 0.5625, "int8": 1.004}
CHUNK_TOKENS, LARGE_CHUNK_TOKENS = 512, 4096  # of `model.losses`: rows of logits that exist at once
PROCESS_BYTES = 480 * 2**20  # interpreter, torch, transformers, peft and the data's buffers, on a CPU
# Of the host, for one that trains on a GPU: a guess, with CUDA's libraries and data; never measured.
HOST_PROCESS_BYTES = 4 * 2**30
CONTEXT_BYTES = 2**30  # of a GPU's libraries, beside tensors
EXCHANGE_BYTES = 2**30  # of NCCL's buffers, where GPUs exchange anything: half a GiB to one and a half; never measured
# Holes that freed tensors leave between live ones, as a share of what a micro-batch needs. With glibc 13 % (bf16) and 22 % (fp32)
# of a full fine-tune were seen, and 51 % and 63 to 150 % of LoRA, whose sums of products are short-lived tensors among those that stay: the same training
# of 12 layers took 106 to 150 % in four runs on one machine. Of a model of 42 M parameters with a small vocabulary it was 176 %. Not measured on a GPU.
SLACK, SLACK_OF_LORA, SLACK_OF_FP32_LORA = 0.2, 0.5, 1.1
# Weights in bf16 that are updated at once, by kind of device, and the bytes that each takes meanwhile. A GPU waits a tenth of a
# millisecond for its host to begin a slice; on a CPU a slice stays in the caches.
UPDATE_SLICES, UPDATE_BYTES = {"cuda": 2**26}, 14
MARGIN = 0.9  # of a device's memory, at most, in a forecast
# On a CPU no more pays: 4,096 tokens through three layers of SmolLM2's took 3.1, 3.0, 3.4 and 3.5 s in micro-batches of 512 to 4,096.
CPU_TOKENS = 2048


LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container


class Device(NamedTuple):
    """The device of one process."""

    bytes: int
    is_gpu: bool = False
    world_size: int = 1
    host_bytes: int = 0
    """Of a GPU: the memory of the host, which all its processes share."""
    processes: int = 1
    """Processes of the training on this host."""
    asked: str = ""
    """The strategy that the launcher asks for, where the recipe leaves it open."""


class Work(NamedTuple):
    """Tokens of a micro-batch and of a step."""

    micro_batch: int
    step: int


def parts(plan: Plan, shape: Shape, work: Work, device: Device) -> dict[str, int]:
    """Bytes at the peak of one process that holds the whole model, by what holds them; on a GPU, those of the GPU. The peak is
    in a step, beside the save of the one before, or in an evaluation, whose rows may be longer."""
    moments = (each(plan, shape, work, device) for each in (step_parts, evaluation_parts))
    return max(moments, key=lambda found: sum(found.values()))


def evaluation_parts(plan: Plan, shape: Shape, work: Work, device: Device) -> dict[str, int]:
    """In an evaluation: nothing is kept for a backward pass, and there are no gradients. Staged copies stay where they are."""
    counts = plan.holdout_counts
    tokens = min(max(work.micro_batch, counts.longest), counts.tokens)
    supervised = round(tokens * counts.supervised_tokens / max(1, counts.tokens))
    found = _lasting(plan, shape, device) | {
        "activations": activations.of_evaluation(plan, shape, tokens),
        "logits": _logits(plan, shape, supervised, is_trained=False) * bool(tokens),
    }
    if plan.recipe.train.ema:  # the weights themselves, while the average is evaluated in their place
        found["average"] += trained_bytes(plan)
    found["slack"] = _slack(plan, device, found["activations"] + found["logits"])
    return found


def _lasting(plan: Plan, shape: Shape, device: Device) -> dict[str, int]:
    """Parts that exist at every moment after the first save."""
    return {
        "process": process_bytes(device),
        "weights": trained_bytes(plan) + sum(_frozen(plan, shape).values()),
        "moments": _moments(plan) + (_scratch(plan, shape) if device.is_gpu else 0),
        **({"average": average_bytes(plan)} if plan.recipe.train.ema else {}),
        **({} if device.is_gpu else {"staging": state_bytes(plan)}),
    }


def process_bytes(device: Device) -> int:
    """Of a process, beside the training's own tensors."""
    if not device.is_gpu:
        return PROCESS_BYTES
    return CONTEXT_BYTES + (EXCHANGE_BYTES if device.world_size > 1 else 0)


def _slack(plan: Plan, device: Device, passing: int) -> int:
    slack_of_lora = SLACK_OF_LORA if width(plan) == 2 else SLACK_OF_FP32_LORA
    return round((slack_of_lora if is_beside(plan) and not device.is_gpu else SLACK) * passing)


def step_parts(plan: Plan, shape: Shape, work: Work, device: Device) -> dict[str, int]:
    """In the forward and backward of a step, while the one before is saved."""
    passing = passing_parts(plan, shape, tokens_of(plan, work), device.is_gpu)
    forward = sum(passing.values())
    found = _lasting(plan, shape, device) | passing | {"slack": _slack(plan, device, forward)}
    gradients = trained_bytes(plan)
    is_alone = work.step <= work.micro_batch * device.world_size
    # with one micro-batch, its activations are freed while gradients are made
    found["gradients"] = max(0, gradients - forward) if is_alone else gradients
    if device.world_size > 1:
        found["gradients"] += gradients  # the buckets in which ranks exchange them
        if (
            plan.recipe.train.reproducibility == "elastic"
        ):  # those of one rank, of all ranks' slices, and the sum of a slice
            found["gradients"] += 2 * gradients + gradients // device.world_size
    return found


def passing_parts(plan: Plan, shape: Shape, tokens: int, is_gpu: bool, is_spread: bool = False) -> dict[str, int]:
    """What a micro-batch needs beside the state, at its peak. `is_spread`: weights are whole only while a layer runs."""
    share = plan.counts.supervised_tokens / max(1, plan.counts.tokens)
    casts, kept = _casts(plan, shape), activations.kept(plan, shape, tokens, is_gpu)
    sums, running = activations.of_sums(plan, shape), activations.while_running(plan, shape, tokens)
    logits, of_head = _logits(plan, shape, round(share * tokens)), _head_gradient(plan, shape)
    is_checkpointed = plan.recipe.train.activation_checkpointing
    if (
        is_checkpointed and is_spread
    ):  # where layers are whole, autocast keeps their casts until the end of the forward pass
        casts //= shape.layers
    whole = {"casts": casts, "sums": sums, "activations": kept + running, "logits": logits}
    # glibc does not give the memory of the one to the other: on a CPU both count (docs/long-rows.md)
    if not is_checkpointed or not is_gpu:
        return whole
    # the end of the forward pass, or the layer that runs again: what the one needs is gone in the other
    forward = whole | {"sums": 0, "activations": kept}
    backward = whole | {"casts": casts if is_spread else casts // shape.layers, "logits": of_head}
    return max(forward, backward, key=lambda found: sum(found.values()))


def tokens_of(plan: Plan, work: Work) -> int:
    """Of the largest micro-batch: a longer row is alone."""
    return min(max(work.micro_batch, plan.counts.longest), work.step)


def staging_sets(plan: Plan, device: Device) -> int:
    """Copies of the state that saves may hold at once: two, or one if the host of a GPU has no room for two."""
    room = MARGIN * device.host_bytes - device.processes * HOST_PROCESS_BYTES
    return 1 if device.is_gpu and 2 * state_bytes(plan) > room else 2


def host_parts(plan: Plan, shape: Shape, work: Work, device: Device) -> dict[str, int]:
    """Bytes of the host beside a GPU, by what holds them; page-locked memory of it cannot be swapped. On a CPU `parts` has it all."""
    if not device.is_gpu:
        return {}
    offloaded = activations.on_host(plan, shape, tokens_of(plan, work))
    return {
        "process": device.processes * HOST_PROCESS_BYTES,
        "staging": staging_sets(plan, device) * state_bytes(plan),
        **({"activations": device.processes * offloaded} if offloaded else {}),
    }


def state_bytes(plan: Plan) -> int:
    """Bytes newly written by every full checkpoint and staged by a save: trained weights, their moments and their average."""
    return trained_bytes(plan) + _moments(plan) + average_bytes(plan)


def update_slice(device_type: str) -> int:
    """Weights in bf16 that an update holds in fp32 at once. It also decides the order of their random numbers."""
    return UPDATE_SLICES.get(device_type, 2**20)


def fits(size: int, device: Device) -> bool:
    return size <= MARGIN * device.bytes


def machine_bytes() -> int:
    """The memory of this machine, or the limit of its container."""
    limits = [int(text) for file in LIMITS if file.exists() and (text := file.read_text().strip()).isdigit()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def trained_bytes(plan: Plan) -> int:
    """The trained weights, or their gradients."""
    return (FLOAT if is_beside(plan) else stored_width(plan)) * plan.trainable_parameters


def _moments(plan: Plan) -> int:
    optimizer = plan.recipe.optimizer
    return optimizer.facts.state_bytes_per_parameter(optimizer) * plan.trainable_parameters


def _scratch(plan: Plan, shape: Shape) -> int:
    """Scratch bytes of an update of bf16 weights: for a slice, or for the largest tensor if that is smaller."""
    is_rounded = plan.recipe.train.weights == "bf16" and not is_beside(plan)
    return UPDATE_BYTES * min(update_slice("cuda"), shape.vocabulary * shape.hidden) if is_rounded else 0


def _frozen(plan: Plan, shape: Shape) -> dict[str, int]:
    """Bytes of frozen weights: linear layers, stored under an adapter in the type of products, and the rest."""
    parameters = plan.total_parameters - plan.trainable_parameters
    if not is_beside(plan):
        return {"rest": stored_width(plan) * parameters}
    embeddings = shape.vocabulary * shape.hidden
    head = 0 if shape.is_tied else embeddings  # a linear layer that is not quantized
    each = QUANTIZED.get(plan.quantization or "", width(plan))
    beside = plan.parameters_beside_text  # not quantized either
    rest = embeddings + shape.not_linear
    linear = round(each * (parameters - rest - head - beside)) + width(plan) * (head + beside)
    return {"linear": linear, "rest": stored_width(plan) * rest}


def _casts(plan: Plan, shape: Shape) -> int:
    """The bf16 copies of fp32 weights that autocast makes for products, kept until the backward pass has used them."""
    if is_beside(plan):
        return 2 * plan.trainable_parameters if width(plan) == 2 else 0
    used = plan.total_parameters - plan.parameters_beside_text - shape.not_linear
    return 2 * (used - shape.vocabulary * shape.hidden) if width(plan) < stored_width(plan) else 0


def _logits(plan: Plan, shape: Shape, supervised_tokens: int, is_trained: bool = True) -> int:
    """A chunk of logits, its fp32 log-probabilities and, in training, their gradients; the head's cast, and its gradient where it is trained."""
    each, head = width(plan), shape.vocabulary * shape.hidden
    # with `gpu_sums` the products' fp32 copy is gone before there are gradients
    halves = 1 + (is_trained and not plan.gpu_sums) if each == 2 else 0
    copies = 2 * FLOAT + each * halves
    tokens = LARGE_CHUNK_TOKENS if plan.gpu_sums and is_trained and not is_beside(plan) else CHUNK_TOKENS
    chunk = min(tokens, supervised_tokens) * shape.vocabulary * copies
    is_stored_so = is_beside(plan) and not shape.is_tied
    cast = head * each if each < stored_width(plan) and not is_stored_so else 0
    return chunk + cast + (0 if is_beside(plan) or not is_trained else _head_gradient(plan, shape) + cast)


def _head_gradient(plan: Plan, shape: Shape) -> int:
    """In fp32: made with the loss, and kept until the backward pass takes it."""
    return 0 if is_beside(plan) else shape.vocabulary * shape.hidden * FLOAT
