"""A base of which each rank reads its own rows: transformers makes the model without a weight, and the weights come from the files.

Types, names, tied tensors, buffers and the making of tensors from several are transformers' own, as in `load_model`. A tensor that it
passes on as the files have it is read by rows. One that it makes, like experts that are stored one by one, is read whole and cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from finetune.errors import BaseError
from finetune.model import rotary, shards
from finetune.model.base import outline, quantized
from finetune.model.base.damaged import name_of
from finetune.model.base.handed_on import Loading, Named, ToRead, buffers_on, cutting, left_as_it_is, one_by_one
from finetune.model.base.load import Place, empty_model, load_config, names_of
from finetune.model.base.loading_class import LoadingClass
from finetune.model.base.stored_rows import StoredRows
from finetune.model.base.weight_files import check_weight_files, refuse_lacking

ROWS_AT_ONCE = 4096  # of two tensors that are compared


@dataclass(frozen=True)
class Unread:
    """A model in eval mode whose weights are still in their files; its buffers are on the device."""

    model: PreTrainedModel
    _loading: Loading
    _rows: StoredRows
    _names: dict[str, str]
    """Of each tensor that the files have as the model does, but perhaps for its type: its name there."""
    _made: frozenset[str]
    """The tensors that transformers makes of others."""
    _owners: dict[tuple[int, str], str]
    """The name of a tensor by its module and its name there: an adapter puts modules around it."""

    @property
    def place(self) -> Place:
        return self._loading.place

    def fill(self, module: torch.nn.Module) -> None:
        """Reads what this process holds of each weight in `module`, which has the model inside: its rows, or all.

        Weights are new objects afterwards. BaseError if a file cannot be read.
        """
        rows = self._rows
        try:
            share = next((shards.share_of(each) for each in module.parameters() if each.is_meta), shards.WHOLE)
            made = self._cut(rows, share) if self._made else {}
            known: dict[int, torch.Tensor] = {}
            for holder, attribute, tensor in list(_on_meta(module)):
                name = self._owners[id(holder), attribute]
                if id(tensor) not in known:  # tied tensors are one
                    part = made.pop(name) if name in made else self._rows_of(rows, name, tensor)
                    known[id(tensor)] = self._placed(part, tensor, name)
                setattr(holder, attribute, known[id(tensor)])
        finally:
            rows.close()

    def _rows_of(self, rows: StoredRows, name: str, tensor: torch.Tensor) -> torch.Tensor:
        own = shards.rows_of(tensor)
        first, end = (own.first, own.end) if own else (0, None)
        return rows.read(self._names[name], first, end, tensor.dtype)

    def _placed(self, part: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
        if part.shape != shards.local(like).shape:
            raise BaseError(f"`{name}` cannot be read by rows", where=name_of(self._loading.path))
        device = self._loading.place.device  # `cpu:0`, which torch takes for another one than `cpu`, and copies
        part = part.to(like.dtype) if device.type == "cpu" else part.to(device, like.dtype)
        placed = shards.placed(part, like)
        if isinstance(like, torch.nn.Parameter):
            return torch.nn.Parameter(placed, requires_grad=like.requires_grad)
        return placed

    def _cut(self, rows: StoredRows, share: shards.Share) -> dict[str, torch.Tensor]:
        """What this process holds of the tensors that transformers makes: each is made whole, and cut before the next one."""
        used = set(self._names.values())
        tensors = {name: ToRead(rows, name) for name in rows.places if name not in used}
        with left_as_it_is(self._loading.model_class), cutting(share), one_by_one():
            model, _ = self._loading.load(tensors)
        found = {name: tensor for _, name, tensor in _tensors(model) if name in self._made and not tensor.is_meta}
        if missing := self._made - found.keys():
            raise BaseError(f"`{min(missing)}` cannot be read by rows", where=name_of(self._loading.path))
        return {name: tensor.detach() for name, tensor in found.items()}


def unread(
    path: Path,
    dtype: torch.dtype,
    attention: str | None,
    place: Place,
    *,
    kind: LoadingClass | None = None,
    keeps_fp32: bool = False,
) -> Unread | None:
    """The model of `load_model`, or of `load_as_stored` with `keeps_fp32`, without its weights. None where these cannot be read so:
    transformers turns the numbers of the files into others, or draws some that they lack."""
    config = load_config(path)
    if getattr(config, quantized.KEY, None):
        return None
    check_weight_files(path)
    empty = empty_model(path, kind)
    in_fp32 = outline.stored_in_fp32(empty, path) if keeps_fp32 else frozenset()
    loading = Loading(type(empty), config, path, dtype, attention, place, in_fp32)
    rows = StoredRows(path)
    if any(each.dtype not in outline.TYPES for each in rows.places.values()):
        return None
    stored = {name: Named(each.shape, outline.TYPES[each.dtype]) for name, each in rows.places.items()}
    with buffers_on(type(empty), place.device):
        model, info = loading.load(stored, device_map={"": "meta"})
    refuse_lacking(path, {kind: names_of(info[kind]) for kind in ("missing_keys", "mismatched_keys")})
    by_memory = {each.given.untyped_storage()._cdata: name for name, each in stored.items() if each.given is not None}
    names, made = {}, set()
    for _, name, tensor in _tensors(model):
        source = by_memory.get(tensor.untyped_storage()._cdata)
        if source and stored[source].is_same(tensor):
            names[name] = source
        elif tensor.is_meta and getattr(tensor, "_is_hf_initialized", False):
            made.add(name)
        elif tensor.is_meta:
            return None
    if not _tie_stored_twice(model, names, rows):
        return None
    model.config.use_cache = False  # with a cache, packed rows would silently see one another
    owners = {(id(holder), name.rpartition(".")[2]): name for holder, name, _ in _tensors(model)}
    return Unread(rotary.separate(model.eval()), loading, rows, names, frozenset(made), owners)


def _tie_stored_twice(model: PreTrainedModel, names: dict[str, str], rows: StoredRows) -> bool:
    """Ties what the files have under both names with equal numbers: transformers cannot compare them unread, and leaves them apart.
    Returns whether it could tell."""
    try:
        for target, source in list(model.all_tied_weights_keys.items()):
            pair = model.get_parameter(target), model.get_parameter(source)
            if pair[0] is pair[1]:
                continue
            if target not in names or source not in names:
                return False
            if _is_equal(rows, (names[target], names[source]), pair):
                holder, _, attribute = target.rpartition(".")
                setattr(model.get_submodule(holder), attribute, pair[1])
            else:
                del model.all_tied_weights_keys[target]
    finally:
        rows.close()
    return True


def _is_equal(rows: StoredRows, names: tuple[str, str], tensors: tuple[torch.Tensor, torch.Tensor]) -> bool:
    one, other = tensors
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pieces = ((first, min(first + ROWS_AT_ONCE, len(one))) for first in range(0, len(one), ROWS_AT_ONCE))
    return all(
        torch.equal(rows.read(names[0], *piece).to(one.dtype), rows.read(names[1], *piece).to(one.dtype))
        for piece in pieces
    )


def _tensors(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Parameters and persistent buffers: the module that has each, and the name in the model."""
    for prefix, module in model.named_modules():
        kept = {name: each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                yield module, f"{prefix}.{name}" if prefix else name, tensor


def _on_meta(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    for module, name, tensor in _tensors(model):
        if shards.local(tensor).is_meta:
            yield module, name.rpartition(".")[2], tensor
