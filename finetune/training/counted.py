"""The parameters of a base, with the adapter of a recipe on it, from its config alone: how many, which are trained, which never are."""

import platform
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import torch
from transformers import PreTrainedModel

from finetune import version
from finetune.errors import AdapterError, RecipeError
from finetune.model import adapters, base, kinds, routing
from finetune.model.base import loading_class, text_side
from finetune.plan.kinds import OfKind
from finetune.plan.older import reaches_all
from finetune.plan.plan import Plan
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Adapter
from finetune.store import cache


class _Counted(TypedDict):
    """`Counted`, as JSON."""

    total: int
    trainable: int
    active: int
    text_of: str | None
    beside_text: int
    kinds: dict[str, OfKind]
    notes: list[str]
    is_changed: bool


@dataclass(frozen=True)
class Counted:
    total: int
    """Parameters, tied ones once."""
    trainable: int
    active: int
    """Those that a token uses."""
    text_of: str | None
    """`Plan.text_of`."""
    beside_text: int
    """`Plan.parameters_beside_text`."""
    kinds: dict[str, OfKind]
    """The base's parameters by kind of module."""
    notes: tuple[str, ...]
    is_changed: bool
    """Whether the adapter reaches something else than with older code; `Plan.reaches_all`."""

    @property
    def in_plan(self) -> dict[str, object]:
        return {
            "total_parameters": self.total,
            "trainable_parameters": self.trainable,
            "active_parameters": self.active if self.active < self.total else 0,
            "text_of": self.text_of,
            "parameters_beside_text": self.beside_text,
            "reaches_all": self.is_changed,
        }


def counted(loaded: LoadedRecipe, directory: Path, like: Plan | None) -> Counted:
    """Of a recipe on its base; `like` is the plan of a run that it goes on with. RecipeError where they do not fit."""
    is_same = like is not None and like.recipe.base == loaded.recipe.base
    is_older = not reaches_all(loaded.recipe, like)
    try:
        return count_parameters(loaded.recipe.adapter, directory, like if is_same else None, is_older)
    except AdapterError as error:
        raise RecipeError([loaded.problem(error.where or "", error.message, error.hint)]) from None


def count_parameters(
    settings: Adapter | None, directory: Path, like: Plan | None = None, is_older: bool = False
) -> Counted:
    """Of a base with an adapter on it, without loading a weight; asked once. `is_older` is of `adapters.apply`. AdapterError where
    they do not fit."""

    def count() -> _Counted:
        wide = like.text_of if like else base.wide_class(base.load_config(directory))
        model = base.empty_model(directory, base.class_named(wide))
        beside = _beside(model) if wide else {}
        parts = base.parts_beside(model) if beside else []
        model = base.freeze_beside_text(model) if beside else model
        skipped = adapters.skipped(model, settings)
        of_text = _told(type(model).__name__, parts, beside) if beside else None
        is_changed = not is_older and adapters.is_changed(model, settings)
        model = adapters.apply(model, settings, is_older)
        parameters, of_kind = list(model.parameters()), kinds.by_kind(model, frozenset(beside))
        missed = kinds.missed(of_kind) if settings and settings.is_peft else None
        return {
            "total": sum(each.numel() for each in parameters),
            "trainable": sum(each.numel() for each in parameters if each.requires_grad),
            "active": kinds.active(model, *routing.sizes_of(model)),
            "text_of": wide,
            "beside_text": sum(beside.values()),
            "kinds": of_kind,
            "notes": [note for note in (of_text, skipped, missed) if note],
            "is_changed": is_changed,
        }

    # Also our code: a fix in it must not leave older results in the cache.
    code = [version(package) for package in ("finetune", "torch", "transformers", "peft")]
    ours = text_of_code(adapters, kinds, loading_class, text_side)
    facts: list[object] = [
        *((directory / "config.json").read_text(), settings and settings.model_dump(mode="json"), code, ours),
        *(is_older, [like.text_of] if like else None),
    ]
    found = cache.found("counted", facts, count)
    return Counted(**{**found, "notes": tuple(found["notes"])})  # type: ignore[arg-type] # the fields are those of `_Counted`


def device_name(device: torch.device) -> str:
    """As runs record it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def text_of_code(*modules: ModuleType) -> list[str]:
    """The code of modules, and of all files of those that are packages."""
    files = [Path(module.__file__ or "") for module in modules]
    parts = [sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file] for file in files]
    return [part.read_text() for each in parts for part in each]


def _beside(model: PreTrainedModel) -> dict[int, int]:
    """The sizes of parameters beside the text side, by their ids."""
    names = base.beside_text(model)
    return {id(each): each.numel() for name, each in model.named_parameters() if name in names}


def _told(kind: str, parts: list[str], beside: dict[int, int]) -> str:
    return (
        f"trains the text side of {kind}; {', '.join(parts)} ({sum(beside.values()):,} parameters) "
        "stay as in the base, to the byte"
    )
