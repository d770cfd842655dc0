"""A plan to the state at step 0: devices, model, loss and optimizer, with what was tried before they are trusted."""

import platform
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from finetune.model import adapters, base, decoder_layers, feed_forward, fused, losses, optimizer, routing
from finetune.model.packing import Packing
from finetune.plan.plan import Plan
from finetune.plan.row_order import derive
from finetune.recipe.schema import Train
from finetune.tasks import TASKS
from finetune.training import collectives
from finetune.training.ema import Average
from finetune.training.fitting import fitting_loss, packing_in
from finetune.training.kernels import Kernels
from finetune.training.saving import snapshot
from finetune.training.slot_sums import SlotSums
from finetune.training.state import Objective, TrainState
from finetune.training.strategy import STRATEGIES

PLAIN = Kernels()
WHOLE_FIRST = "each rank loads the whole base before it keeps its rows: the base's files do not hold its weights as they are trained"


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


def trained_model(
    plan: Plan, base_directory: Path, device: torch.device, parts: fused.Parts | None = None
) -> PreTrainedModel:
    """The base's model with the recipe's adapter on it, as it is at step 0, made on the device; with `parts` in kernels."""
    recipe, packing = plan.recipe, packing_in(plan, base_directory)
    kind = base.class_named(plan.text_of)
    place = _place(plan, base_directory, device, kind)
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
    return _adapted(model, plan, packing, adapters.taken_for_fp32(model, place.names), parts)


def unread_model(
    plan: Plan, base_directory: Path, device: torch.device, parts: fused.Parts | None = None
) -> tuple[PreTrainedModel, base.Unread] | None:
    """As `trained_model`, with the base's weights still in their files, and what reads them; None where they cannot be read by rows."""
    kind, packing = base.class_named(plan.text_of), packing_in(plan, base_directory)
    dtype, place = base.DTYPES[plan.recipe.train.weights], base.Place(device, _halved(plan, base_directory, kind))
    attention = packing and packing.attention
    unread = base.unread(base_directory, dtype, attention, place, kind=kind, keeps_fp32=plan.keeps_fp32)
    if unread is None:
        return None
    model = unread.model
    return _adapted(model, plan, packing, adapters.taken_for_real(model, place.names, device), parts), unread


def _adapted(
    model: PreTrainedModel,
    plan: Plan,
    packing: Packing | None,
    taken: AbstractContextManager[None],
    parts: fused.Parts | None,
) -> PreTrainedModel:
    if plan.text_of:
        model = base.freeze_beside_text(model)
    if parts:
        fused.apply(model, parts)
    if packing:
        packing.apply(model)
    # The initial matrices depend on the recipe's seed alone, and not on what was drawn before.
    torch.manual_seed(derive(plan.recipe.train.seed, "adapter"))
    with taken:
        return adapters.apply(model, plan.recipe.adapter, is_older=not plan.reaches_all)


def _place(plan: Plan, base_directory: Path, device: torch.device, kind: base.LoadingClass) -> base.Place:
    """The device, and on it what `adapter.store_frozen_as_bf16` would make bf16 in bf16 at once.

    On a CPU fp32 files are mapped, and then cast layer by layer. Other files would first become a whole model in fp32.
    """
    is_mapped = device.type == "cpu" and not base.has_halves(base_directory)
    return base.Place(device, frozenset() if is_mapped else _halved(plan, base_directory, kind))


def _halved(plan: Plan, base_directory: Path, kind: base.LoadingClass) -> frozenset[str]:
    recipe, settings = plan.recipe, plan.recipe.train
    is_halved = settings.precision == "bf16" and settings.weights == "fp32" and not plan.quantization
    if not is_halved or not recipe.is_adapted:
        return frozenset()
    return adapters.linear_weights(base.empty_model(base_directory, kind))


def build(
    plan: Plan, base_directory: Path, accelerator: Accelerator, strategy_name: str = "ddp", kernels: Kernels = PLAIN
) -> TrainState:
    """The state at step 0."""
    recipe, strategy, device = plan.recipe, STRATEGIES[strategy_name], accelerator.device
    made = None
    is_spread = strategy.is_sharded and accelerator.num_processes > 1
    if is_spread:
        with collectives.together(accelerator):
            made = unread_model(plan, base_directory, device, kernels.parts)
    model, unread = made or (trained_model(plan, base_directory, device, kernels.parts), None)
    objective = Objective(model, TASKS[recipe.task.name].loss, losses.chunked)
    reason = None if unread else _complete(objective, plan, base_directory)

    def optimizer_of_what_is_read() -> torch.optim.Optimizer:
        if unread:
            with collectives.together(accelerator):
                unread.fill(objective)
            objective.load_state_dict({}, strict=False)  # loads nothing, and has FSDP take the new tensors for its own
        return optimizer.build(model, recipe.optimizer, recipe.train.seed)

    wrapped, prepared = strategy.prepare(accelerator, objective, optimizer_of_what_is_read)
    if unread:
        reason = _complete(objective, plan, base_directory, accelerator)
    whole = WHOLE_FIRST if is_spread and not unread else None
    fast = f"kernels are {kernels.told}" if kernels.parts else None
    notes = tuple(filter(None, [fast, losses.note(reason), whole, *notes_here(recipe.train)]))
    state = TrainState(accelerator, wrapped, model, prepared, strategy, routers=objective.routers, notes=notes)
    if recipe.train.reproducibility == "elastic" and accelerator.num_processes > 1:
        trained = list(state.trainable.values())
        state.slot_sums = SlotSums(trained, accelerator.process_index, accelerator.num_processes)
    if recipe.train.ema:
        state.average = Average(recipe.train.ema, snapshot.Live(state).trained)
    return state


def _complete(
    objective: Objective, plan: Plan, base_directory: Path, spread_by: Accelerator | None = None
) -> str | None:
    """Does to an objective what needs its weights, which may be spread over ranks; returns the reason of `losses.fitting`."""
    model, settings = objective.model, plan.recipe.train
    if plan.gpu_sums and adapters.is_adapter(model):
        adapters.sum_as_a_gpu(model)

    def is_mixed() -> bool:
        kind, device = base.class_named(plan.text_of), next(model.parameters()).device
        names = _halved(plan, base_directory, kind) if spread_by else _place(plan, base_directory, device, kind).names
        return plan.keeps_fp32 or bool(names)

    # Chunked logits save gigabytes, but only if they give this model's own loss. That is tried first.
    objective.token_losses, reason = fitting_loss(plan, objective, base_directory, is_mixed, spread_by)
    if settings.precision == "bf16" and adapters.is_adapter(model) and not spread_by:
        # Autocast would cast them to the same bits in every step; kept in bf16 they take half the memory.
        adapters.store_frozen_as_bf16(model)
    if settings.activation_checkpointing:
        decoder_layers.checkpoint_activations(model, settings.activation_offload)
    if settings.mlp_chunk_tokens:
        feed_forward.in_pieces(model, settings.mlp_chunk_tokens)
    if settings.compile:
        decoder_layers.compile_layers(model, settings.has_fixed_lengths)
    # transformers loads models in eval mode, without dropout.
    model.train()
    objective.routers = routing.watched(model, settings.router_loss, settings.compile)
    return reason
