"""A loaded model, tried before it is trained: whether packed rows stay apart, and which form of the loss fits it."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from finetune import version
from finetune.errors import FinetuneError, explained
from finetune.model import attention, fused, losses, rotary, row_by_row
from finetune.model import packing as packed
from finetune.model.packing import OURS, Packing
from finetune.plan.plan import Plan
from finetune.recipe.schema import Train
from finetune.store import cache
from finetune.training import collectives
from finetune.training.counted import device_name, text_of_code
from finetune.training.state import Objective
from finetune.training.trial import packing_of

FUSED_OFF = "set train.kernels: plain"


def packing_in(plan: Plan, base_directory: Path) -> Packing | None:
    """How the rows of a plan are packed, if they are."""
    return packing_of(base_directory, plan.recipe.task.max_length) if plan.arrangement == "packed" else None


def fitting_loss(
    plan: Plan,
    objective: Objective,
    base_directory: Path,
    is_mixed: Callable[[], bool],
    spread_by: Accelerator | None = None,
) -> tuple[losses.TokenLosses, str | None]:
    """As `losses.fitting`, after `check_packing`. Both run the model, and would find the same at every start: of the same base, trained in
    the same way by the same code, they are asked once. `is_mixed`: it has weights of two types. Where its weights are spread over ranks,
    all ranks try it together, with `spread_by`."""
    recipe, model = plan.recipe, objective.model
    device = next(model.parameters()).device
    ours = [Path(module.__file__ or "").read_text() for module in (attention, losses, packed, rotary, row_by_row)]
    packing = packing_in(plan, base_directory)
    facts = {
        "base": [recipe.base.model_dump(mode="json"), plan.base.model_dump(mode="json")],
        "adapter": recipe.adapter and recipe.adapter.model_dump(mode="json"),
        "task": [packing, recipe.task.max_length],
        "class": [plan.text_of, plan.reaches_all],
        "numbers": [recipe.train.weights, plan.keeps_fp32, recipe.train.precision, device_name(device)],
        "code": [*ours, *(version(package) for package in ("finetune", "torch", "transformers", "peft"))],
        **({"spread": True} if spread_by else {}),
        **({"fused": text_of_code(fused), "kernels": fused.liger.versions()} if fused.switch_of(model) else {}),
    }

    def find() -> str | None:
        # weights of two types meet in products that only autocast brings together
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=is_mixed())
        with as_trained(recipe.train, device), mixed:
            if packing:
                check_packing(model, recipe.task.max_length, packing)
            check_kernels(model, is_whole=not spread_by)
            return losses.fitting(model)[1]

    if spread_by:
        reason = collectives.found_by_all(spread_by, "checks", facts, lambda: objective.inside(find))
    else:
        reason = cache.found("checks", facts, find)
    return (losses.full, reason) if reason else (losses.in_large_chunks if plan.gpu_sums else losses.chunked, None)


def check_kernels(model: PreTrainedModel, is_whole: bool = True) -> None:
    """Runs short rows in kernels and by the model's own code, forward and, of a whole model, backward. FinetuneError where they differ."""
    switch = fused.switch_of(model)
    if switch is None:
        return
    model.eval()
    found = []
    with explained("fused kernels fail on this base", "train.kernels", FUSED_OFF), fused.liger.told_as_usual():
        for is_on in (False, True):
            switch.is_on = is_on
            found.append(_answers(model, is_whole))
    for (plain, ours), tolerance in zip(zip(*found, strict=True), (1, 4), strict=False):
        # of the norm, as in `check_packing`; a gradient in bf16 was rounded in twice as many places
        allowed = tolerance * (0.05 if _is_rounded(model, plain.device) else 1e-3)
        if not (ours - plain).norm() <= allowed * plain.norm():
            message = "fused kernels do not give what this base gives"
            raise FinetuneError(message, where="train.kernels", hint=FUSED_OFF)


def _answers(model: PreTrainedModel, is_whole: bool) -> list[torch.Tensor]:
    """Logits of a row, fp32, and the gradient of their squares by the embeddings."""
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    rows = _spread_tokens(embeddings.num_embeddings)[None].to(next(model.parameters()).device)
    begun: list[torch.Tensor] = []

    def begin(_: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        begun.append(output.detach().requires_grad_(is_whole))
        return begun[0]

    hook = embeddings.register_forward_hook(begin)
    try:
        with torch.set_grad_enabled(is_whole):
            logits = model(input_ids=rows, use_cache=False).logits.float()
            gradient = torch.autograd.grad(logits.square().mean(), begun[:1]) if is_whole else ()
    finally:
        hook.remove()
    return [logits.detach(), *(each.float() for each in gradient)]


def _spread_tokens(count: int) -> torch.Tensor:
    """Tokens from everywhere: control tokens in a row make some models chaotic, which in bf16 shows as much as mixing does."""
    return torch.arange(1, 17) * 2_654_435_761 % count


def _is_rounded(model: PreTrainedModel, device: torch.device) -> bool:
    is_mixed = any(parameter.dtype != torch.float32 for parameter in model.parameters())
    return torch.is_autocast_enabled(device.type) or is_mixed


def as_trained(settings: Train, device: torch.device) -> torch.autocast:
    """The products of training, for what is tried out on a GPU: its kernels, and weights of two types. On a CPU fp32 tells more, and is kept."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and settings.precision == "bf16")


def check_packing(model: PreTrainedModel, max_length: int, packing: Packing = OURS) -> None:
    """Runs two short rows packed and alone: a model that mixes them would train on the wrong thing, silently.

    So would one whose window does not reach our attention: short rows do not show that, so its layers are asked.
    """
    count = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    rows = _spread_tokens(count)[None].to(next(model.parameters()).device)
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
    # no_grad: what FSDP makes in inference mode could not be trained.
    with torch.no_grad(), explained("cannot be packed", "task.packing", "set task.packing: false"):
        together = model(use_cache=False, **packed).logits
        if packing.attention:
            model.set_attn_implementation("eager")  # the base's own, which leaves nothing of it out
        parts = [model(input_ids=row, use_cache=False).logits for row in rows.split([9, 7], dim=1)]
        alone = torch.cat(parts, dim=1)
        if packing.attention:
            model.set_attn_implementation(packing.attention)
    # of the norm: seen on SmolLM2 are 0 in fp32, 0.004 to 0.02 with bf16 or 4-bit weights, and 0.17 where rows are mixed
    tolerance = 0.05 if _is_rounded(model, rows.device) else 1e-3
    if (together - alone).float().norm() > tolerance * alone.float().norm():
        raise FinetuneError("this base mixes packed rows", where="task.packing", hint="set task.packing: false")
