"""What changes while training: model, optimizer and the number of the last finished step.

`run` builds one from a plan, `loop` moves it, `checkpoints/snapshot` writes and reads it.
"""

import ctypes
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from finetune import version
from finetune.errors import FinetuneError
from finetune.hosts.world import cores, refuse_half
from finetune.model import adapters, attention, base, decoder_layers, losses, optimizer
from finetune.plan.plan import Plan
from finetune.plan.row_order import derive
from finetune.recipe.schema import Recipe, Train
from finetune.store import cache
from finetune.tasks import TASKS
from finetune.training import collectives
from finetune.training.saving.buffers import Copy

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


class Objective(torch.nn.Module):
    """The model with its loss inside, so that the forward that DDP or FSDP wraps is the one that is differentiated."""

    def __init__(self, model: torch.nn.Module, loss: Callable, token_losses: Callable):
        super().__init__()
        self.model = model
        self._loss = loss
        self.token_losses = token_losses

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """A collated micro-batch -> summed loss (nats) and the sum of each row."""
        return self._loss(self.model, batch, self.token_losses)


@dataclass
class TrainState:
    accelerator: Accelerator
    objective: torch.nn.Module
    """The prepared (wrapped) objective; the only thing `loop` calls."""
    model: torch.nn.Module
    """The bare model inside it; the only thing snapshots read."""
    optimizer: torch.optim.Optimizer
    step: int = 0
    copy: Copy | None = None
    """A snapshot under way; whatever writes weights awaits it first."""
    notes: tuple[str, ...] = ()
    """What its user should know of how it trains."""

    def __post_init__(self):
        names = [decoder_layers.module_of(name) for name in self.trainable]
        self.modules = list(dict.fromkeys(names))
        """Groups of modules whose gradients are measured, in the order of the model."""
        self.module_places = [self.modules.index(name) for name in names]
        """Of each trainable parameter its group."""
        self._places: tuple[tuple[int, ...], torch.Tensor] = ((), torch.empty(0))

    def places_on_device(self, places: tuple[int, ...]) -> torch.Tensor:
        """The same numbers as int64 where the gradients are; kept, for they are the same at every step."""
        if self._places[0] != places:
            made, device = torch.tensor(places), self.accelerator.device
            self._places = (
                places,
                made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device),
            )
        return self._places[1]

    def await_snapshot(self) -> float:
        """Returns when no copy needs the tensors as they are; the seconds it took."""
        if self.copy is None:
            return 0.0
        copy, self.copy = self.copy, None
        copy.awaited_seconds = copy.wait()
        return copy.awaited_seconds

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name, tied ones once."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def start_accelerator(settings: Train) -> Accelerator:
    """Devices, precision and processes. FinetuneError where the launcher started fewer than it was asked for, or more than know of each other."""
    refuse_half(os.environ)
    collectives.refuse_other_ways()
    if settings.reproducibility == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose another order of summation
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # a check for careless kernels that writes every buffer twice
        )
    if not torch.accelerator.is_available():
        _keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())  # torch counts the host's cores: beyond the quota they hinder each other
    AcceleratorState._reset_state()  # else a second one in this process inherits the first one's precision
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        # Plain DDP rebuilds its buckets after the first backward, so a resumed run would sum in another order than an
        # uninterrupted one (seen with 3 and 4 ranks); with unused-parameter search on, it never rebuilds them.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    declared = collectives.declared()
    if accelerator.num_processes != declared:
        raise FinetuneError(
            f"the launcher was asked for {declared} processes, and {accelerator.num_processes} know of each other",
            hint=f"on CPUs `finetune launch --nproc-per-node {declared} RECIPE` starts as many; `accelerate launch` starts one",
        )
    collectives.connect(accelerator)
    return accelerator


def slow_numbers(precision: str) -> str | None:
    """A line where this machine has no instructions for the numbers of a precision, as x86 before AVX-512 has none for bf16."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and not torch.accelerator.is_available()
    if precision != "bf16" or not is_x86 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "this CPU has no instructions for bf16, which takes a hundred times as long as fp32: set train.precision: fp32"
    )


def _keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one: to get it from the system again, zeroed page by page, took a third of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            mallopt(name, value)


def trained_model(plan: Plan, base_directory: Path, device: torch.device) -> torch.nn.Module:
    """The base's model with the recipe's adapter on it, as it is at step 0, made on the device."""
    recipe = plan.recipe
    place = _place(recipe, base_directory, device)
    load = base.load_as_stored if plan.keeps_fp32 else base.load_model
    model = load(
        base_directory,
        base.DTYPES[recipe.train.weights],
        attention.PER_ROW if plan.arrangement == "packed" else None,
        recipe.base.quantization,
        base.DTYPES[recipe.train.precision],
        place,
    )
    torch.manual_seed(derive(recipe.train.seed, "adapter"))
    with adapters.taken_for_fp32(model, place.names):
        return adapters.apply(model, recipe.adapter)


def _place(recipe: Recipe, base_directory: Path, device: torch.device) -> base.Place:
    """The device, and on it what `adapter.store_frozen_as_bf16` would make bf16 in bf16 at once."""
    settings = recipe.train
    is_halved = settings.precision == "bf16" and settings.weights == "fp32" and not recipe.base.quantization
    if device.type == "cpu" or not is_halved or not (recipe.adapter and recipe.adapter.is_peft):
        return base.Place(device)
    return base.Place(device, adapters.linear_weights(base.empty_model(base_directory)))


def build(plan: Plan, base_directory: Path, accelerator: Accelerator) -> TrainState:
    """The state at step 0."""
    recipe = plan.recipe
    model = trained_model(plan, base_directory, accelerator.device)
    token_losses, reason = _fitting_loss(plan, model)
    if recipe.train.precision == "bf16" and adapters.is_adapter(model):
        adapters.store_frozen_as_bf16(model)
    if recipe.train.activation_checkpointing:
        decoder_layers.checkpoint_activations(model)
    if recipe.train.compile:
        decoder_layers.compile_layers(model)
    model.train()
    objective = Objective(model, TASKS[recipe.task.name].loss, token_losses)
    with warnings.catch_warnings():  # Accelerate gives DDP an older name of an option, and each rank says so
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        objective, prepared = accelerator.prepare(
            objective, optimizer.build(model, recipe.optimizer, recipe.train.seed)
        )
    notes = tuple(filter(None, [losses.note(reason), slow_numbers(recipe.train.precision)]))
    return TrainState(accelerator, objective, model, prepared, notes=notes)


def _fitting_loss(plan: Plan, model: torch.nn.Module) -> tuple[Callable, str | None]:
    """As `losses.fitting`, after `check_packing`. Both run the model, and would find the same at every start: of the same base, trained in
    the same way by the same code, they are asked once."""
    recipe, device = plan.recipe, next(model.parameters()).device
    ours = [Path(module.__file__).read_text() for module in (attention, losses)]
    facts = {
        "base": [recipe.base.model_dump(mode="json"), plan.base.model_dump(mode="json")],
        "adapter": recipe.adapter and recipe.adapter.model_dump(mode="json"),
        "task": [plan.arrangement == "packed", recipe.task.max_length],
        "numbers": [recipe.train.weights, plan.keeps_fp32, recipe.train.precision, device_name(device)],
        "code": [*ours, *(version(package) for package in ("finetune", "torch", "transformers", "peft"))],
    }

    def find() -> str | None:
        # weights of two types meet in products that only autocast brings together
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=plan.keeps_fp32)
        with as_trained(recipe.train, device), mixed:
            if plan.arrangement == "packed":
                check_packing(model, recipe.task.max_length)
            return losses.fitting(model)[1]

    reason = cache.found("checks", facts, find)
    return (losses.full, reason) if reason else (losses.chunked, None)


def as_trained(settings: Train, device: torch.device) -> torch.autocast:
    """The products of training, for what is tried out on a GPU: its kernels, and weights of two types. On a CPU fp32 tells more, and is kept."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and settings.precision == "bf16")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def check_packing(model: torch.nn.Module, max_length: int) -> None:
    """Runs two short rows packed and alone: a model that mixes them would train on the wrong thing, silently.

    So would one whose window does not reach our attention: short rows do not show that, so its layers are asked.
    """
    # tokens from everywhere: control tokens in a row make some models chaotic, which in bf16 shows as much as mixing does
    rows = (torch.arange(1, 17) * 2_654_435_761 % model.get_input_embeddings().num_embeddings).reshape(2, 8)
    rows = rows.to(next(model.parameters()).device)
    bounds = [0, 8, 16]
    packed = {"position_ids": torch.arange(8, device=rows.device).repeat(2)[None], "row_bounds": bounds}
    packed["cu_seq_lens"] = torch.tensor(bounds, dtype=torch.int32, device=rows.device)  # for the kernel of a GPU
    text = model.config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or ["sliding_attention"]
    is_cut = window and window < max_length and "sliding_attention" in kinds
    if is_cut and window not in attention.windows_of(model, {"input_ids": rows.reshape(1, 16), **packed}):
        message = f"this base attends within {window} tokens in a way that packing does not know"
        raise FinetuneError(message, where="task.packing", hint="set task.packing: false")
    with torch.inference_mode():
        together = model(input_ids=rows.reshape(1, 16), use_cache=False, **packed).logits.reshape(2, 8, -1)
        model.set_attn_implementation("eager")  # the base's own, which leaves nothing of it out
        alone = model(input_ids=rows, use_cache=False).logits
        model.set_attn_implementation(attention.PER_ROW)
    # of the norm: seen on SmolLM2 are 0 in fp32, 0.004 to 0.02 with bf16 or 4-bit weights, and 0.17 where rows are mixed
    is_rounded = torch.is_autocast_enabled(rows.device.type)
    is_rounded = is_rounded or any(parameter.dtype != torch.float32 for parameter in model.parameters())
    tolerance = 0.05 if is_rounded else 1e-3
    if (together - alone).float().norm() > tolerance * alone.float().norm():
        raise FinetuneError("this base mixes packed rows", where="task.packing", hint="set task.packing: false")
