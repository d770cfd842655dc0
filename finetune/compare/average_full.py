"""Averages of whole weights, a tensor at a time: products and sums in fp64, the result in fp32.

So equal weights come out as they are, to the bit, in whatever order and number of threads.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from finetune.compare.average_members import Member
from finetune.errors import FinetuneError
from finetune.model import adapters, base
from finetune.model.base import outline
from finetune.recipe.schema import Base
from finetune.store.checkpoints.manifest import Checkpoint, FileRecord
from finetune.store.checkpoints.tensor_files import EMA, FROZEN, of_kind
from finetune.store.tensors import Tensor, read_header
from finetune.training.opened import open_model


class Kind(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by the names in its files, read one at a time."""

    ref: str
    kinds: Mapping[str, Kind]
    read: Callable[[str], torch.Tensor]


Weighted = Sequence[tuple[Weights, float]]


def of_members(members: Sequence[Member], files: ExitStack, is_kept_ema: bool = False) -> Weighted:
    """The weights of each member, by the names in the first one that is no base. FinetuneError for other names or shapes."""
    first = next(member for member in members if not member.is_base)
    like = _of_directory(first, files, is_kept_ema)
    others = ((member, like if member is first else _of_other(member, like, files, is_kept_ema)) for member in members)
    return [(weights, member.weight) for member, weights in others]


class Sums:
    """Weighted sums of the tensors of several models, added one model after the other."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}

    def add(self, ref: str, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        """Tensors without fractions are not added: they have to be the same in all."""
        for name, tensor in tensors.items():
            own = tensor.detach().cpu()
            if not own.is_floating_point():
                if not torch.equal(self.totals.setdefault(name, own.clone()), own):
                    raise FinetuneError(f"`{name}` differs between members, and has no fractions", where=ref)
                continue
            total = self.totals.setdefault(name, torch.zeros(own.shape, dtype=torch.float64))
            # First a product, then a sum: fused, the rounding would depend on a number's place in a vector.
            total += own.double() * weight

    def weights(self, ref: str) -> Weights:
        kinds = {name: Kind(total.dtype, tuple(total.shape)) for name, total in self.totals.items()}
        return Weights(ref, kinds, self.totals.__getitem__)


def mean(weights: Weighted, name: str) -> torch.Tensor:
    """The weighted sum of one tensor, in fp32 if it has fractions."""
    sums = Sums()
    for each, weight in weights:
        sums.add(each.ref, {name: each.read(name)}, weight)
    total = sums.totals[name]
    return total.to(_result(total.dtype))


def averaged(weights: Weighted, skipped: frozenset[str] = frozenset()) -> list[Tensor]:
    """The tensors of the average, each made while it is written."""
    return [
        Tensor(name, base.STORED_DTYPES[_result(kind.dtype)], kind.shape, b"", make=partial(_mean_bytes, weights, name))
        for name, kind in weights[0][0].kinds.items()
        if name not in skipped
    ]


def frozen_files(members: Sequence[Member]) -> list[tuple[Path, FileRecord]]:
    """The files of weights that cannot change, if every member but the base has the same ones."""
    found = [frozen_of(member.checkpoint) if member.checkpoint else [] for member in members if not member.is_base]
    records = [[record for _, record in each] for each in found]
    return found[0] if all(each == records[0] for each in records) else []


def frozen_of(checkpoint: Checkpoint) -> list[tuple[Path, FileRecord]]:
    """The files of a checkpoint with weights that cannot change."""
    files = checkpoint.manifest.files
    return [(checkpoint.path / name, files[name]) for name in of_kind(files, FROZEN)]


def of_model(ref: str, model: PreTrainedModel) -> Weights:
    tensors = adapters.weights(model)
    kinds = {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Weights(ref, kinds, tensors.__getitem__)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def whole_directory(member: Member) -> Path:
    """Whole weights: an adapter is merged onto its base, once, in the cache."""
    if not member.is_adapter:
        return member.directory
    return base.directory(Base(checkpoint=member.ref), base.pin(Base(checkpoint=member.ref)))


def _of_directory(member: Member, files: ExitStack, is_kept_ema: bool) -> Weights:
    directory = whole_directory(member)
    places = {name: directory / file for file, found in outline.headers_by_file(directory).items() for name in found}
    if is_kept_ema:
        places |= {name: path for path in kept_ema(member) for name in read_header(path)}
    opened = {path: files.enter_context(safe_open(path, "pt")) for path in sorted(set(places.values()))}
    headers = {path: read_header(path) for path in opened}
    kinds = {name: headers[path][name] for name, path in places.items()}
    return Weights(
        member.ref,
        {name: Kind(outline.TYPES[place.dtype], place.shape) for name, place in kinds.items()},
        lambda name: opened[places[name]].get_tensor(name),
    )


def kept_ema(member: Member) -> list[Path]:
    """The files of the moving average that a run kept; of an adapter it is one."""
    if names := of_kind([path.name for path in member.directory.iterdir()], EMA):
        return [member.directory / name for name in names]
    raise FinetuneError("has no moving average", where=member.ref, hint="set train.ema in the recipe of a run")


def _of_other(member: Member, like: Weights, files: ExitStack, is_kept_ema: bool) -> Weights:
    """With the same names: if the files have others, as a base's on the Hub may, those of the loaded model."""
    found = None if member.is_base else _of_directory(member, files, is_kept_ema)
    if found is None or found.kinds.keys() != like.kinds.keys():
        found = of_model(member.ref, open_model(member.ref, is_as_trained=False).model)
    for name in sorted(found.kinds.keys() ^ like.kinds.keys()):
        has, lacks = (found, like) if name in found.kinds else (like, found)
        raise FinetuneError(f"`{name}` is in {has.ref}, and not in {lacks.ref}", hint="average models of one kind")
    for name, kind in found.kinds.items():
        if kind.shape != (shape := like.kinds[name].shape):
            message = f"`{name}` has the shape {list(kind.shape)}, and {list(shape)} in {like.ref}"
            raise FinetuneError(message, where=member.ref, hint="average models of one shape and vocabulary")
    return found


def _result(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _mean_bytes(weights: Weighted, name: str) -> memoryview:
    return as_bytes(mean(weights, name))
