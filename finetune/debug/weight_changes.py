"""Distances between the weights of two models, tensor by tensor, with one tensor at a time in memory.

An adapter counts as its product (alpha / r) B A of each module (LoRA, arXiv 2106.09685). So you can compare adapters of different
ranks, or with rotated factors.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from safetensors import safe_open

from finetune.errors import FinetuneError
from finetune.model import base
from finetune.model.decoder_layers import module_of
from finetune.store.checkpoints.tensor_files import ADAPTER, EMA, OPTIMIZER, kind_of

PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_embedding_A")


class ChangeRecord(TypedDict):
    """A `Change`, as `diff --json` prints it."""

    name: str
    size: int
    norm: float
    change: float
    relative: float
    largest: float


class Change(NamedTuple):
    """Of one tensor, from A to B; norms are 2-norms of all its numbers."""

    name: str
    size: int
    norm: float
    """Norm of A's weight; for an adapter, of the base's weight under it."""
    change: float
    relative: float
    """`change / norm`."""
    largest: float
    """The largest change of one number."""

    @property
    def record(self) -> ChangeRecord:
        return cast(ChangeRecord, self._asdict())


@dataclass(frozen=True)
class Weights:
    """The tensors of a directory by name, read on access; those of an adapter are its products."""

    read: Mapping[str, Callable[[], torch.Tensor]]
    is_adapter: bool
    directory: Path
    base: "Weights | None" = None
    """The base of an adapter."""


def weights_of(directory: Path) -> Weights:
    if (directory / "adapter_config.json").exists():
        below = base.directory(*base.beneath(directory, str(directory)))
        return Weights(_products(directory), True, directory, weights_of(below))
    return Weights(dict(_tensors(directory)), False, directory)


def changes(one: Weights, two: Weights) -> tuple[list[Change], dict[str, list[str]]]:
    """The change of every tensor that both have in one shape, in the order of the model; and the names of the others, by reason.

    A base compared with an adapter counts as an adapter that adds nothing.
    """
    is_adapter = one.is_adapter or two.is_adapter
    bases = {(side.base or side).directory.resolve() for side in (one, two)}
    if is_adapter and len(bases) > 1:
        hint = "package both merged, and compare the packages"
        raise FinetuneError("an adapter can be compared with its own base, or with another adapter on it", hint=hint)
    below = one.base or two.base
    names = list(dict.fromkeys([*one.read, *two.read] if not is_adapter else [*_added(one), *_added(two)]))
    found: list[Change] = []
    others: dict[str, list[str]] = {"only in A": [], "only in B": [], "of another shape": []}
    for name in names:
        first, second = (side.read.get(name) if side.is_adapter or not is_adapter else None for side in (one, two))
        if not is_adapter and not (first and second):
            others["only in A" if first else "only in B"].append(name)
            continue
        before, after = (read().float() if read else None for read in (first, second))
        if before is not None and after is not None and before.shape != after.shape:
            others["of another shape"].append(name)
            continue
        weight = below.read[name]().float() if is_adapter and below and name in below.read else before
        found.append(_change(name, weight, _difference(before, after)))
    return found, {kind: names for kind, names in others.items() if names}


def _difference(before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
    """From A to B; a side that has nothing adds nothing."""
    if after is None:
        return torch.empty(0) if before is None else -before
    return after if before is None else after - before


def by_module(found: Sequence[Change]) -> list[Change]:
    """The same for groups of modules, as in the recorded gradient norms."""
    groups: dict[str, list[Change]] = {}
    for item in found:
        groups.setdefault(module_of(item.name), []).append(item)
    return [total(name, groups[name]) for name in sorted(groups, key=_natural)]


def total(name: str, items: Sequence[Change]) -> Change:
    norm, change = (math.sqrt(sum(getattr(item, field) ** 2 for item in items)) for field in ("norm", "change"))
    largest = max((item.largest for item in items), default=0.0)
    return Change(name, sum(item.size for item in items), norm, change, _relative(change, norm), largest)


def picture(found: Sequence[Change], path: Path) -> None:
    """A PNG: a row for each group of modules, a column for each kind of tensor in it, coloured by the relative change."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = sorted({module_of(item.name) for item in found}, key=_natural)
    columns = list(dict.fromkeys(_kind(item.name) for item in found))
    cells = torch.full((len(rows), len(columns)), math.nan)
    for item in found:
        cells[rows.index(module_of(item.name)), columns.index(_kind(item.name))] = item.relative or math.nan
    known = cells[torch.isfinite(cells)]
    least, most = (float(known.min()), float(known.max())) if len(known) else (1e-9, 1.0)
    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"backend": matplotlib.rcParams["backend"]}):
        figure = Figure(figsize=(2 + 0.5 * len(columns), 1.5 + 0.22 * len(rows)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(cells.numpy(), aspect="auto", cmap="viridis", norm=LogNorm(least, max(most, least * 1.001)))
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title("relative change of the weights", fontsize=10)
        figure.colorbar(image, ax=axes)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _change(name: str, weight: torch.Tensor | None, difference: torch.Tensor) -> Change:
    norm = 0.0 if weight is None else float(weight.double().norm())
    change = float(difference.double().norm())
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return Change(name, difference.numel(), norm, change, _relative(change, norm), largest)


def _relative(change: float, norm: float) -> float:
    return change / norm if norm else (0.0 if change == 0 else math.inf)


def _added(side: Weights) -> list[str]:
    return list(side.read) if side.is_adapter else []


def _natural(name: str) -> list[tuple[int, str]]:
    """`layers.9` comes before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _kind(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    parts = [part for part in name.split(".") if part not in ("weight", "model")]
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[0] + 1 :]) if numbered else parts[-1]


def _tensors(directory: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    for path in sorted(directory.glob("*.safetensors")):
        if kind_of(path.name) in (OPTIMIZER, EMA):
            continue
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        yield from ((name, partial(_read, path, name)) for name in names)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _products(directory: Path) -> dict[str, Callable[[], torch.Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_bytes())
    path = directory / ADAPTER
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name in names:
        factor = next((factor for factor in FACTORS if name.endswith(factor)), None)
        if factor:
            module = name.removesuffix(factor).removeprefix(PREFIX)
            found[f"{module}.weight"] = partial(_product, path, name, name.replace("_A", "_B"), config)
        elif not name.endswith(tuple(each.replace("_A", "_B") for each in FACTORS)):
            found[name.removeprefix(PREFIX)] = partial(_read, path, name)  # saved whole, beside the factors
    return found


def _product(path: Path, a: str, b: str, config: dict[str, Any]) -> torch.Tensor:
    """(alpha / r) B A; of an embedding, transposed as its weight is."""
    left, right = _read(path, b).float(), _read(path, a).float()
    rank = right.shape[0]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    product = left @ right * scale
    return product.T if "embedding" in a else product
