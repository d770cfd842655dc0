"""What transformers is given in place of weights, so that it makes a model without them, or of one tensor after another."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from finetune.errors import explained
from finetune.model import shards
from finetune.model.base import outline
from finetune.model.base.damaged import name_of
from finetune.model.base.load import Place
from finetune.model.base.quiet import quiet
from finetune.model.base.stored_rows import StoredRows

META = torch.device("meta")
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Has transformers read the tensors of one parameter after those of another; else threads read all of them at once."""


class Named:
    """Stands for a tensor of the files: what transformers hands on as it is can be told from what it makes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._shape, self._dtype = shape, dtype
        self.given: torch.Tensor | None = None

    def __getitem__(self, _: object) -> "Named":
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


class ToRead:
    """Stands for a tensor of the files that is read when transformers wants it."""

    def __init__(self, rows: StoredRows, name: str):
        self._rows, self._name = rows, name

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._rows.read(self._name)


@dataclass(frozen=True)
class Loading:
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


@contextmanager
def buffers_on(model_class: type[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """Models of this class are made on the meta device, with buffers that no file has on this one: there transformers computes them."""
    move = model_class._move_missing_keys_from_meta_to_device

    def only_buffers(model: PreTrainedModel, missing: object, device_map: object, *rest: Any) -> None:
        move(model, set(), {"": device}, *rest)  # type: ignore[arg-type] # it takes a set

    with _replaced(model_class, "_move_missing_keys_from_meta_to_device", only_buffers):
        yield


@contextmanager
def left_as_it_is(model_class: type[PreTrainedModel]) -> Iterator[None]:
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
def one_by_one() -> Iterator[None]:
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
def cutting(share: shards.Share) -> Iterator[None]:
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
