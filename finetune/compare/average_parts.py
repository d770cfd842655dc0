"""What an average is made of before it is written: tensors that are made one at a time, and the configs beside them."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.compare import average_full, average_lora
from finetune.compare.average_choice import Choices
from finetune.compare.average_lora import Adapter
from finetune.compare.average_members import Member
from finetune.compare.average_replay import Replayed
from finetune.errors import FinetuneError
from finetune.model import base
from finetune.model.base import merge
from finetune.model.base.quiet import quiet
from finetune.store import tensors as safetensors
from finetune.store.checkpoints.attempt import Attempt
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.tensor_files import ADAPTER, INDEX, TRAINED, WHOLE
from finetune.store.tensors import Tensor

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Parts:
    tensors: list[Tensor]
    small_files: dict[str, bytes]
    """Tokenizer, template and configs."""
    adapter_config: dict[str, Any] | None = None
    """None for whole weights."""
    frozen: Sequence[tuple[Path, FileRecord]] = ()
    """Files of weights that cannot change: they are linked."""
    notes: tuple[str, ...] = ()
    """Lines about the form of the result."""
    lost: float | None = None
    """The part of the norm of the change that a smaller rank loses."""

    @property
    def form(self) -> str:
        return "whole weights" if self.adapter_config is None else "adapter"

    def write(self, attempt: Attempt) -> None:
        for name, content in self.small_files.items():
            attempt.write_bytes(name, content)
        if self.adapter_config is not None:
            attempt.write_tensors(ADAPTER, self.tensors, {"format": "pt"})
            attempt.write_json(ADAPTER_CONFIG, self.adapter_config)
            return
        attempt.write_tensors(TRAINED if self.frozen else WHOLE, self.tensors, {"format": "pt"})
        if self.frozen:
            for path, record in self.frozen:
                attempt.link(path.name, path, record)
            files = [TRAINED, *(path.name for path, _ in self.frozen)]
            names = {record.name: file for file in files for record in attempt.files[file].tensors}
            total = sum(record.bytes for file in files for record in attempt.files[file].tensors)
            attempt.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def of_members(
    members: Sequence[Member],
    choices: Choices,
    files: ExitStack,
    scratch: Path,
    companions: base.Companions | None = None,
) -> Parts:
    """The average of members that are in files: an adapter where that is exact and small, else whole weights."""
    first = next(member for member in members if not member.is_base)
    companions = companions or base.Companions(first.tokenizer_directory, None)
    adapters = average_lora.adapters_of(members, files, choices.is_kept_ema)
    if isinstance(adapters, str):
        if choices.rank:
            raise FinetuneError(f"--rank is about LoRA adapters alone: {adapters}", hint="remove it")
        is_asked = choices.is_merged or not first.is_adapter
        return _whole(members, choices, files, companions, () if is_asked else (f"whole weights, because {adapters}",))
    small_files = companions.contents(with_config=True)
    if choices.rank:
        made, lost = average_lora.truncated(adapters, choices.rank)
        return Parts(
            made.tensors,
            small_files,
            made.config,
            notes=(f"rank {choices.rank} loses {lost:.3%} of the change",),
            lost=lost,
        )
    if choices.is_merged:
        return _merged(adapters, first, small_files, scratch)
    if average_lora.is_as_it_is(adapters):
        made = average_lora.copied(adapters[0])
        return Parts(made.tensors, small_files, made.config)
    if average_lora.is_small(adapters):
        made = average_lora.concatenated(adapters)
        return Parts(made.tensors, small_files, made.config)
    rank = average_lora.concatenated(adapters).config["r"]
    note = f"whole weights, because an adapter of rank {rank} has more numbers; --rank N makes a smaller one that is not exact"
    return _merged(adapters, first, small_files, scratch, (note,))


def of_window(replayed: Replayed, choices: Choices, files: ExitStack, scratch: Path) -> Parts:
    """The average of the steps of a run of which only some are stored."""
    if choices.is_kept_ema:
        hint = "make them with `finetune replay --materialize`"
        raise FinetuneError("--kept-ema takes stored steps", hint=hint)
    if replayed.is_adapter:
        return of_members(replayed.members(scratch), choices, files, scratch, replayed.companions)
    weights, skipped = replayed.summed(), _names(replayed.frozen)
    tensors = average_full.averaged([(weights, 1.0)], skipped)
    return Parts(tensors, _with_fp32(replayed.companions.contents(with_config=True)), frozen=replayed.frozen)


def _whole(
    members: Sequence[Member], choices: Choices, files: ExitStack, companions: base.Companions, notes: tuple[str, ...]
) -> Parts:
    first = next(member for member in members if not member.is_base)
    weights, frozen = average_full.of_members(members, files, choices.is_kept_ema), average_full.frozen_files(members)
    config = (average_full.whole_directory(first) / CONFIG).read_bytes()
    small_files = _with_fp32({**companions.contents(with_config=False), CONFIG: config})
    return Parts(average_full.averaged(weights, _names(frozen)), small_files, frozen=frozen, notes=notes)


def _merged(
    adapters: Sequence[Adapter],
    first: Member,
    small_files: dict[str, bytes],
    scratch: Path,
    notes: tuple[str, ...] = (),
) -> Parts:
    """The average of adapters merged onto their base, in fp32, and compared with the base under the adapter."""
    made = average_lora.concatenated(adapters)
    with (scratch / ADAPTER).open("wb") as file:
        safetensors.write(file, made.tensors, {"format": "pt"})
    (scratch / ADAPTER_CONFIG).write_text(json.dumps(made.config))
    below = first.base_directory
    model = base.load_model(below, kind=base.class_below(scratch, below, first.ref))
    with quiet():
        model = merge.merge(model, scratch, first.ref)
    tensors = average_full.averaged([(average_full.of_model(first.ref, model), 1.0)])
    tied = {"tie_word_embeddings": model.config.tie_word_embeddings}
    return Parts(tensors, _with_fp32(small_files, tied), notes=notes)


def _with_fp32(small_files: dict[str, bytes], changes: dict[str, Any] | None = None) -> dict[str, bytes]:
    config = base.with_dtype(json.loads(small_files[CONFIG]), torch.float32) | (changes or {})
    return small_files | {CONFIG: f"{json.dumps(config, indent=2)}\n".encode()}


def _names(frozen: Sequence[tuple[Path, FileRecord]]) -> frozenset[str]:
    return frozenset(tensor.name for _, record in frozen for tensor in record.tensors)
