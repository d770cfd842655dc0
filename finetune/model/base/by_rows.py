"""A base of which each rank reads its own rows: transformers makes the model without a weight, and the weights come from the files.

Types, names, tied tensors, buffers and the making of tensors from several are transformers' own, as in `load_model`. A tensor that it
passes on as the files have it is read by rows. One that it makes, like experts that are stored one by one, is read whole and cut.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from finetune.errors import BaseError, explained
from finetune.model import rotary, shards
from finetune.model.base import outline, quantized
from finetune.model.base.damaged import name_of
from finetune.model.base.load import Place, empty_model, load_config
from finetune.model.base.loading_class import LoadingClass
from finetune.model.base.quiet import quiet
from finetune.model.base.stored_rows import StoredRows
from finetune.model.base.weight_files import check_weight_files, refuse_lacking

META = torch.device("meta")
ROWS_AT_ONCE = 4096  # of two tensors that are compared
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Has transformers read the tensors of one parameter after those of another; else threads read all of them at once."""


class _Named:
    """Stands for a tensor of the files: what transformers hands on as it is can be told from what it makes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._shape, self._dtype = shape, dtype
        self.given: torch.Tensor | None = None

    def __getitem__(self, _: object) -> "_Named":
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.given = torch.empty(self._shape, dtype=dtype or self._dtype, device=META)
        return self.given

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is what was handed out: a view of a part, a copy or an operation in place makes it another one."""
        given = self.given
        return (
            given is not None
            and tensor.untyped_storage()._cdata == given.untyped_storage()._cdata
            and (tensor.shape, tensor.stride(), tensor.storage_offset()) == (given.shape, given.stride(), 0)
            and given._version == 0
        )


class _Read:
    """Stands for a tensor of the files that is read when transformers wants it."""

    def __init__(self, rows: StoredRows, name: str):
        self._rows, self._name = rows, name

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._rows.read(self._name)


@dataclass(frozen=True)
class _Loading:
    """How transformers makes the model."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    path: Path
    dtype: torch.dtype
    attention: str | None
    place: Place
    in_fp32: frozenset[str]

    def load(self, tensors: Mapping[str, object], **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(explained("transformers cannot open it", name_of(self.path)))
            stack.enter_context(self.place.reading(self.model_class))
            stack.enter_context(outline.keeping(self.model_class, self.in_fp32))
            # with `output_loading_info` it is a pair, which its signature does not say
            loaded: Any = self.model_class.from_pretrained(
                None,
                config=self.config,
                state_dict=dict(tensors),
                dtype=self.dtype,
                attn_implementation=self.attention,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        return loaded


@dataclass(frozen=True)
class Unread:
    """A model in eval mode whose weights are still in their files; its buffers are on the device."""

    model: PreTrainedModel
    _loading: _Loading
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
        return rows.read(self._names[name], *((own.first, own.end) if own else ()))

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
        tensors = {name: _Read(rows, name) for name in rows.places if name not in used}
        with _left_as_it_is(self._loading.model_class), _cutting(share), _one_by_one():
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
    loading = _Loading(type(empty), config, path, dtype, attention, place, in_fp32)
    rows = StoredRows(path)
    stored = {name: _Named(each.shape, outline.TYPES[each.dtype]) for name, each in rows.places.items()}
    with _buffers_on(type(empty), place.device):
        model, info = loading.load(stored, device_map={"": "meta"})
    refuse_lacking(path, {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys")})
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


@contextmanager
def _buffers_on(model_class: type[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """Models of this class are made on the meta device, with buffers that no file has on this one: there transformers computes them."""
    move = model_class._move_missing_keys_from_meta_to_device

    def only_buffers(model: PreTrainedModel, missing: object, device_map: object, *rest: Any) -> None:
        move(model, set(), {"": device}, *rest)  # type: ignore[arg-type] # it takes a set

    with _replaced(model_class, "_move_missing_keys_from_meta_to_device", only_buffers):
        yield


@contextmanager
def _left_as_it_is(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """What no file fills stays on the meta device."""
    with (
        _replaced(model_class, "_move_missing_keys_from_meta_to_device", lambda *_: None),
        _replaced(model_class, "_initialize_missing_keys", lambda *_: None),
    ):
        yield


@contextmanager
def _replaced(model_class: type[PreTrainedModel], name: str, function: Callable[..., None]) -> Iterator[None]:
    """A method of this class alone."""
    own = vars(model_class).get(name)
    setattr(model_class, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(model_class, name)
        else:
            setattr(model_class, name, own)


@contextmanager
def _one_by_one() -> Iterator[None]:
    before = os.environ.get(ONE_BY_ONE)
    os.environ[ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ONE_BY_ONE]
        else:
            os.environ[ONE_BY_ONE] = before


@contextmanager
def _cutting(share: shards.Share) -> Iterator[None]:
    """A parameter that gets its numbers keeps this process's rows of them alone."""

    def cut(_: torch.nn.Module, __: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(share.of(parameter.data).clone(), requires_grad=parameter.requires_grad)

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(cut)  # type: ignore[arg-type] # what it returns is taken
    try:
        yield
    finally:
        hook.remove()
