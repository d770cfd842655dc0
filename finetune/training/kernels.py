"""Which kernels a training runs: fused ones where device, packages and base allow it, and a trial finds the same numbers.

The trial runs on the device, on a small model of the base's kind. `fitting` then tries the base itself.
"""

from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from finetune import version
from finetune.errors import BaseError, FinetuneError, explained
from finetune.model import base, fused, tiny
from finetune.model.fused import Parts, formulas, liger
from finetune.plan.shape import Shape
from finetune.recipe.resume_rules import COMPILED, PLAIN
from finetune.recipe.schema import Recipe
from finetune.store import cache
from finetune.training.arrangements import rows_for
from finetune.training.counted import device_name, text_of_code

INSTALL = "pip install 'finetune[kernels]'"
TOLERANCE = 1e-3  # of the norm of each gradient, in fp32


class Kernels(NamedTuple):
    name: str = PLAIN
    """As runs record it: `plain`, `compiled`, or packages with their versions."""
    why: str = "the recipe says so"
    """Of plain ones; else what is fused."""
    parts: Parts | None = None

    @property
    def told(self) -> str:
        return f"{'fused' if self.parts else self.name}: {self.why}"

    def shaped(self, shape: Shape) -> Shape:
        """A shape, with what these kernels fuse."""
        if self.parts is None:
            return shape
        return shape._replace(has_fused_norms=bool(self.parts.norms), has_fused_feed_forward=bool(self.parts.gated))


class Compared(TypedDict):
    """As JSON."""

    parts: Parts | None
    reason: str | None
    """Why none is fused."""


def chosen(recipe: Recipe, directory: Path, recorded: str | None = None, is_refused: bool = True) -> Kernels:
    """The kernels of a training here, of a run with these recorded ones, or of a new one. FinetuneError where the recipe says `fused`, and
    they cannot run, if that `is_refused`."""
    named = recipe.train.kernels
    if recipe.train.has_fixed_lengths:
        return Kernels(COMPILED, "norms, feed-forward")
    if named == "plain":
        return Kernels()
    if named == "auto" and recorded == PLAIN:
        return Kernels(why="the run began so")
    found = available(recipe, directory, named == "fused")
    if named == "fused" and found.parts is None and is_refused:
        hint = INSTALL if liger.versions() is None else "set train.kernels: auto"
        raise FinetuneError(f"`fused` kernels cannot run: {found.why}", where="train.kernels", hint=hint)
    return found


def available(recipe: Recipe, directory: Path, is_asked: bool = False) -> Kernels:
    """Fused kernels, or plain ones and the reason. `is_asked`: by name, so also interpreted ones will do."""
    if recipe.train.compile:
        return Kernels(why="train.compile fuses the same parts")
    device = _device(is_asked)
    if device is None:
        return Kernels(why="this machine has no CUDA device")
    if (name := liger.versions()) is None:
        return Kernels(why="liger-kernel and triton are not both installed")
    config, max_length = base.load_config(directory), recipe.task.max_length
    code = [*text_of_code(fused, tiny), Path(__file__).read_text(), *map(version, ("torch", "transformers"))]
    facts = [(directory / "config.json").read_text(), max_length, name, device_name(device), code]
    try:
        found = cache.found("kernels", facts, lambda: compared(config, max_length, device))
    except BaseError as error:
        return Kernels(why=error.message)
    if found["reason"]:
        return Kernels(why=found["reason"])
    parts = as_parts(found["parts"])
    return Kernels(name, parts.told, parts)


def _device(is_asked: bool) -> torch.device | None:
    """Where kernels can run. An interpreted one is for those who ask: it takes minutes for a step."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if is_asked and liger.is_interpreted() else None


def as_parts(json: object) -> Parts:
    """What JSON made lists of."""
    norms, gated, rotary = cast(tuple[dict[str, list[object]], dict[str, list[object]], dict[str, str]], json)
    return Parts(
        {name: formulas.Norm(*each) for name, each in norms.items()},  # type: ignore[arg-type]
        {name: formulas.Gated(*each) for name, each in gated.items()},  # type: ignore[arg-type]
        rotary,
    )


def compared(config: PretrainedConfig, max_length: int, device: torch.device) -> Compared:
    """Finds the modules of a base's kind that kernels can replace, and checks that gradients stay the same in fp32 and bf16. BaseError
    where the kernels fail, which another start may not see again."""
    parts = fused.parts_of(tiny.model_like(config, max_length))
    if not parts.told:
        return {"parts": None, "reason": "this base has nothing that a kernel knows"}
    model = tiny.model_like(config, max_length)
    cast(torch.nn.Module, model).to(device)
    switch = fused.apply(model, parts)
    with explained("fused kernels fail", type(model).__name__), liger.told_as_usual():
        reason = _difference(model, switch)
    unused: dict[str, Any] = {kind: {} for kind in Parts._fields if not switch.calls.get(kind)}
    used = parts._replace(**unused)
    if reason or not used.told:
        return {"parts": None, "reason": reason or "this base has nothing that a kernel knows"}
    return {"parts": used, "reason": None}


def _difference(model: PreTrainedModel, switch: fused.Switch) -> str | None:
    switch.is_on = False
    exact, rounded = _gradients(model), _gradients(model, is_bf16=True)
    switch.is_on = True
    ours, ours_rounded = _gradients(model), _gradients(model, is_bf16=True)
    whole = torch.stack([each.norm() for each in exact.values()]).norm()
    for name, truth in exact.items():
        scale = truth.norm() + 1e-3 * whole
        if not (ours[name] - truth).norm() <= TOLERANCE * scale:
            return f"fused kernels give another gradient of {name}"
        # As near to fp32 as plain code, which rounds in other places.
        if not (ours_rounded[name] - truth).norm() <= 2 * (rounded[name] - truth).norm() + 0.02 * scale:
            return f"in bf16, fused kernels give another gradient of {name}"
    return None


def _gradients(model: PreTrainedModel, is_bf16: bool = False) -> dict[str, Tensor]:
    """Of the logits' squares, of two rows; some families have parameters that text does not use."""
    row = rows_for(model)[1]
    rows = torch.cat([row, row.flip(1)])
    trained = {name: each for name, each in model.named_parameters() if each.is_floating_point()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
        loss = model(input_ids=rows, use_cache=False).logits.float().square().mean()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: each.float() for name, each in zip(trained, found, strict=True) if each is not None}
