"""A plan to the state at step 0: devices, model, loss and optimizer, with what was tried before they are trusted."""

import platform
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from finetune import version
from finetune.errors import FinetuneError, explained
from finetune.model import (
    adapters,
    attention,
    base,
    decoder_layers,
    feed_forward,
    losses,
    optimizer,
    rotary,
    routing,
    row_by_row,
)
from finetune.model import packing as packed
from finetune.model.packing import OURS, Packing
from finetune.plan.plan import Plan
from finetune.plan.row_order import derive
from finetune.recipe.schema import Train
from finetune.store import cache
from finetune.tasks import TASKS
from finetune.training.ema import Average
from finetune.training.saving import snapshot
from finetune.training.slot_sums import SlotSums
from finetune.training.state import Objective, TrainState
from finetune.training.strategy import STRATEGIES
from finetune.training.trial import packing_of


def slow_numbers(precision: str) -> str | None:
    """A line where this machine has no instructions for the numbers of a precision, as x86 before AVX-512 has none for bf16."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and not torch.accelerator.is_available()
    if precision != "bf16" or not is_x86 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "this CPU has no instructions for bf16, which takes a hundred times as long as fp32: set train.precision: fp32"
    )


def notes_here(settings: Train) -> list[str]:
    """What to say of settings that are slow or do nothing on this machine."""
    slow, is_host = slow_numbers(settings.precision), not torch.accelerator.is_available()
    idle = "train.activation_offload moves nothing: this machine has no GPU, so activations are in its memory already"
    return [*([slow] if slow else []), *([idle] if is_host and settings.activation_offload else [])]


def trained_model(plan: Plan, base_directory: Path, device: torch.device) -> PreTrainedModel:
    """The base's model with the recipe's adapter on it, as it is at step 0, made on the device."""
    recipe = plan.recipe
    kind = base.class_named(plan.text_of)
    place = _place(plan, base_directory, device, kind)
    packing = packing_of(base_directory, recipe.task.max_length) if plan.arrangement == "packed" else None
    load = base.load_as_stored if plan.keeps_fp32 else base.load_model
    model = load(
        base_directory,
        base.DTYPES[recipe.train.weights],
        packing and packing.attention,
        plan.quantization,
        base.DTYPES[recipe.train.precision],
        place,
        kind=kind,
    )
    if plan.text_of:
        model = base.freeze_beside_text(model)
    if packing:
        packing.apply(model)
    # The initial matrices depend on the recipe's seed alone, and not on what was drawn before.
    torch.manual_seed(derive(recipe.train.seed, "adapter"))
    with adapters.taken_for_fp32(model, place.names):
        return adapters.apply(model, recipe.adapter, is_older=not plan.reaches_all)


def _place(plan: Plan, base_directory: Path, device: torch.device, kind: base.LoadingClass) -> base.Place:
    """The device, and on it what `adapter.store_frozen_as_bf16` would make bf16 in bf16 at once.

    On a CPU fp32 files are mapped, and then cast layer by layer. Other files would first become a whole model in fp32.
    """
    recipe, settings = plan.recipe, plan.recipe.train
    is_halved = settings.precision == "bf16" and settings.weights == "fp32" and not plan.quantization
    is_mapped = device.type == "cpu" and not base.has_halves(base_directory)
    if is_mapped or not is_halved or not recipe.is_adapted:
        return base.Place(device)
    return base.Place(device, adapters.linear_weights(base.empty_model(base_directory, kind)))


def build(plan: Plan, base_directory: Path, accelerator: Accelerator, strategy_name: str = "ddp") -> TrainState:
    """The state at step 0."""
    recipe = plan.recipe
    model = trained_model(plan, base_directory, accelerator.device)
    # Chunked logits save gigabytes, but only if they give this model's own loss. That is tried first.
    token_losses, reason = _fitting_loss(plan, model, base_directory)
    if recipe.train.precision == "bf16" and adapters.is_adapter(model):
        # Autocast would cast them to the same bits in every step; kept in bf16 they take half the memory.
        adapters.store_frozen_as_bf16(model)
    if recipe.train.activation_checkpointing:
        decoder_layers.checkpoint_activations(model, recipe.train.activation_offload)
    if recipe.train.mlp_chunk_tokens:
        feed_forward.in_pieces(model, recipe.train.mlp_chunk_tokens)
    if recipe.train.compile:
        decoder_layers.compile_layers(model)
    # transformers loads models in eval mode, without dropout.
    model.train()
    routers = routing.watched(model, recipe.train.router_loss, recipe.train.compile)
    objective = Objective(model, TASKS[recipe.task.name].loss, token_losses, routers)
    strategy = STRATEGIES[strategy_name]
    wrapped, prepared = strategy.prepare(
        accelerator, objective, lambda: optimizer.build(model, recipe.optimizer, recipe.train.seed)
    )
    notes = tuple(filter(None, [losses.note(reason), *notes_here(recipe.train)]))
    state = TrainState(accelerator, wrapped, model, prepared, strategy, routers=routers, notes=notes)
    if recipe.train.reproducibility == "elastic" and accelerator.num_processes > 1:
        trained = list(state.trainable.values())
        state.slot_sums = SlotSums(trained, accelerator.process_index, accelerator.num_processes)
    if recipe.train.ema:
        state.average = Average(recipe.train.ema, snapshot.Live(state).trained)
    return state


def _fitting_loss(plan: Plan, model: PreTrainedModel, base_directory: Path) -> tuple[losses.TokenLosses, str | None]:
    """As `losses.fitting`, after `check_packing`. Both run the model, and would find the same at every start: of the same base, trained in
    the same way by the same code, they are asked once."""
    recipe, device = plan.recipe, next(model.parameters()).device
    ours = [Path(module.__file__ or "").read_text() for module in (attention, losses, packed, rotary, row_by_row)]
    packing = packing_of(base_directory, recipe.task.max_length) if plan.arrangement == "packed" else None
    facts = {
        "base": [recipe.base.model_dump(mode="json"), plan.base.model_dump(mode="json")],
        "adapter": recipe.adapter and recipe.adapter.model_dump(mode="json"),
        "task": [packing, recipe.task.max_length],
        "class": [plan.text_of, plan.reaches_all],
        "numbers": [recipe.train.weights, plan.keeps_fp32, recipe.train.precision, device_name(device)],
        "code": [*ours, *(version(package) for package in ("finetune", "torch", "transformers", "peft"))],
    }

    def find() -> str | None:
        # weights of two types meet in products that only autocast brings together
        is_mixed = plan.keeps_fp32 or bool(_place(plan, base_directory, device, base.class_named(plan.text_of)).names)
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=is_mixed)
        with as_trained(recipe.train, device), mixed:
            if packing:
                check_packing(model, recipe.task.max_length, packing)
            return losses.fitting(model)[1]

    reason = cache.found("checks", facts, find)
    return (losses.full, reason) if reason else (losses.chunked, None)


def as_trained(settings: Train, device: torch.device) -> torch.autocast:
    """The products of training, for what is tried out on a GPU: its kernels, and weights of two types. On a CPU fp32 tells more, and is kept."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and settings.precision == "bf16")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def check_packing(model: PreTrainedModel, max_length: int, packing: Packing = OURS) -> None:
    """Runs two short rows packed and alone: a model that mixes them would train on the wrong thing, silently.

    So would one whose window does not reach our attention: short rows do not show that, so its layers are asked.
    """
    # tokens from everywhere: control tokens in a row make some models chaotic, which in bf16 shows as much as mixing does
    count = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    rows = (torch.arange(1, 17) * 2_654_435_761 % count)[None].to(next(model.parameters()).device)
    # of unlike lengths: rows of one length are one call
    bounds = [0, 9, 16]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None].to(rows.device)
    packed = {"input_ids": rows, "position_ids": positions, "row_bounds": bounds}
    packed["cu_seq_lens"] = torch.tensor(bounds, dtype=torch.int32, device=rows.device)  # for the kernel of a GPU
    text = model.config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or ["sliding_attention"]
    is_cut = packing.attention and window and window < max_length and "sliding_attention" in kinds
    if is_cut and window not in attention.windows_of(model, packed):
        message = f"this base attends within {window} tokens in a way that packing does not know"
        raise FinetuneError(message, where="task.packing", hint="set task.packing: false")
    # Longer rows went through a small model of this kind; that this one is of the kind shows here.
    with torch.inference_mode(), explained("cannot be packed", "task.packing", "set task.packing: false"):
        together = model(use_cache=False, **packed).logits
        if packing.attention:
            model.set_attn_implementation("eager")  # the base's own, which leaves nothing of it out
        parts = [model(input_ids=row, use_cache=False).logits for row in rows.split([9, 7], dim=1)]
        alone = torch.cat(parts, dim=1)
        if packing.attention:
            model.set_attn_implementation(packing.attention)
    # of the norm: seen on SmolLM2 are 0 in fp32, 0.004 to 0.02 with bf16 or 4-bit weights, and 0.17 where rows are mixed
    is_rounded = torch.is_autocast_enabled(rows.device.type)
    is_rounded = is_rounded or any(parameter.dtype != torch.float32 for parameter in model.parameters())
    tolerance = 0.05 if is_rounded else 1e-3
    if (together - alone).float().norm() > tolerance * alone.float().norm():
        raise FinetuneError("this base mixes packed rows", where="task.packing", hint="set task.packing: false")
