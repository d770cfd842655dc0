"""Live state to and from the files of a checkpoint; the only code that knows both torch and the format.

Every checkpoint directory loads with plain `from_pretrained` (peft's, for an adapter). `saver` calls `write` inside an
attempt of the store, and `reading` brings them back.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import or_
from pathlib import Path
from typing import Any

import torch

from finetune.model import adapters, base, shards
from finetune.plan import disk
from finetune.plan.plan import Plan
from finetune.store import tensors as safetensors
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.store import Attempt, Checkpoint
from finetune.store.checkpoints.tensor_files import (
    ADAPTER,
    EMA,
    FROZEN,
    INDEX,
    OPTIMIZER,
    TRAINED,
    WHOLE,
    divided,
    kind_of,
    of_kind,
)
from finetune.store.durable import failures, replacing
from finetune.store.tensors import Tensor
from finetune.training.saving.buffers import Copy, Staging
from finetune.training.state import TrainState


@dataclass(frozen=True)
class Snapshot:
    """A state at one step: its tensors are being copied, and all else is here."""

    step: int
    adapter_config: dict[str, Any] | None
    """None where whole weights are trained."""
    copy: Copy
    """Trained weights as `weights/<name>`, moments as `moments/<name>`, their moving average as `ema/<name>`."""
    buffers: dict[str, torch.Tensor]
    """What a forward may change, already copied."""
    frozen: dict[str, torch.Tensor]
    """Weights that cannot change, as they are in the model."""
    scalars: dict[str, float]
    rows: dict[str, shards.Rows]
    """Of each tensor that is spread over ranks, by the names of `copy` and of `frozen`, what this rank has."""
    bytes: int
    """Of the copied tensors, over all ranks."""


class Live:
    """The tensors of a state by the names that a checkpoint gives them. Looked up once: updates are in place."""

    def __init__(self, state: TrainState):
        model, tensors = state.model, state.strategy.saved_tensors(state)
        # A checkpoint of an adapter has neither frozen weights nor buffers: they are in the base.
        is_whole = not adapters.is_adapter(model)
        still = {name for name, parameter in model.named_parameters() if is_whole and not parameter.requires_grad}
        buffers = {name for name, _ in model.named_buffers() if is_whole}
        self.frozen = {name: tensor for name, tensor in tensors.items() if name in still}
        """What cannot change."""
        self.buffers = {name: tensor for name, tensor in tensors.items() if name in buffers}
        """What a forward may change."""
        self.trained = {name: tensor for name, tensor in tensors.items() if name not in still | buffers}
        """What an update changes."""
        self._average = state.average.tensors if state.average else {}
        self._parameters = state.trainable
        self._optimizer = state.optimizer
        self.rows: dict[str, shards.Rows] = {}
        """Of each tensor that is spread over ranks, what this one has; complete once there are moments."""

    def copied(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What is copied in the background (weights as `weights/<name>`, moments as `moments/<name>.<key>`, the average as
        `ema/<name>`), and single numbers."""
        found = {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        live = {f"weights/{name}": tensor for name, tensor in self.trained.items()}
        live |= {f"moments/{name}": value for name, value in found.items() if value.ndim}
        live |= {f"ema/{name}": tensor for name, tensor in self._average.items()}
        counters = {name: value for name, value in found.items() if not value.ndim}
        numbers = torch.stack(list(counters.values())).tolist() if counters else []  # one read of the device for all
        if live.keys() - self.rows.keys() and shards.is_spread(live):
            found = {name: shards.rows_of(tensor) for name, tensor in (live | self.frozen).items()}
            self.rows = {name: rows for name, rows in found.items() if rows}
        return {name: shards.local(tensor) for name, tensor in live.items()}, dict(zip(counters, numbers, strict=True))


def take(state: TrainState, live: Live, plan: Plan, staging: Staging) -> Snapshot:
    """Begins a snapshot; `state.await_snapshot` ends the copying, and must come before anything writes weights."""
    # One copy at a time: an update waits for `state.copy`, and knows of no other.
    state.await_snapshot()
    tensors, scalars = live.copied()
    state.copy = staging.take(tensors)
    config = adapters.config_of(state.model, plan) if adapters.is_adapter(state.model) else None
    # Small, and written by the next forward, which nothing makes wait: copied at once.
    buffers = {name: tensor.detach().clone().cpu() for name, tensor in live.buffers.items()}
    size = _whole_bytes_of(tensors, live)
    return Snapshot(state.step, config, state.copy, buffers, live.frozen, scalars, live.rows, size)


def whole_bytes(live: Live) -> int:
    """`Snapshot.bytes` of a snapshot that is not taken."""
    return _whole_bytes_of(live.copied()[0], live)


def _whole_bytes_of(tensors: dict[str, torch.Tensor], live: Live) -> int:
    return sum(_whole_bytes(tensor, live.rows.get(name)) for name, tensor in tensors.items())


def _whole_bytes(tensor: torch.Tensor, rows: shards.Rows | None) -> int:
    return tensor.element_size() * prod(rows.shape) if rows else tensor.nbytes


def warm(state: TrainState, live: Live, staging: Staging, sets: int) -> None:
    """Makes buffers and fills them once, after the first update, so that the first save finds them warm.

    Those of a GPU are warm when they are page-locked: all sets are made beside the training, and no update waits for them.
    """
    state.await_snapshot()
    tensors = live.copied()[0]
    if state.accelerator.device.type != "cpu":
        for _ in range(sets):
            staging.make_ahead(tensors)
        return
    state.copy = staging.take(tensors)
    state.copy.release_when_done()


def write(
    snapshot: Snapshot, plan: Plan, companions: base.Companions, previous: Checkpoint | None, attempt: Attempt
) -> None:
    """All files of a checkpoint but its manifest. What cannot change is linked from the checkpoint before."""
    # This is the writer's thread, so training does not wait here.
    snapshot.copy.wait()
    earlier = of_kind(previous.manifest.files, FROZEN) if previous else []
    files = files_of(snapshot)
    new = {name: files[name] for name in files if not (earlier and kind_of(name) == FROZEN)}
    attempt.write_files({name: (tensors, metadata_of(name)) for name, tensors in new.items()})
    if previous:
        for name in earlier:
            attempt.link(name, previous.path / name, previous.manifest.files[name])
    _write_index(attempt)
    if snapshot.adapter_config is not None:
        attempt.write_json("adapter_config.json", snapshot.adapter_config)
    else:
        attempt.write_json("config.json", _config(companions.directory, plan.recipe.train.weights))
    record = {"step": snapshot.step, "optimizer": plan.recipe.optimizer.name, "scalars": snapshot.scalars}
    attempt.write_json("state.json", record)
    for name, content in companions.contents(with_config=snapshot.adapter_config is not None).items():
        _write_or_link(name, content, previous, attempt)


class _OtherWeightsError(Exception):
    """The base has other weights than were committed."""


def restore_frozen(live: Live, path: Path, record: FileRecord) -> bool:
    """Rewrites a file of frozen weights of a checkpoint from the base's, if they are what its manifest speaks of."""
    names = {each.name for each in record.tensors}
    frozen = [tensor for tensor in _tensors(live.frozen, live.rows) if tensor.name in names]
    with suppress(_OtherWeightsError), failures(path), replacing(path) as file:
        records = safetensors.write(file, frozen, {"format": "pt"})
        # Raised within `replacing`, so that the damaged file stays for you to look at.
        if FileRecord(file.bytes, file.digest(), tuple(records)) != record:
            raise _OtherWeightsError
        return True
    return False


def stored_bytes(snapshot: Snapshot, previous: Checkpoint | None) -> int:
    """What a commit of the snapshot adds to the disk; what the first one shares with later ones at the large end."""
    shared = 0 if previous else disk.COMPANION_BYTES + sum(tensor.nbytes for tensor in snapshot.frozen.values())
    return snapshot.bytes + shared


def _write_index(attempt: Attempt) -> None:
    """Where each weight is; a single file needs none."""
    files = [name for kind in (WHOLE, TRAINED, FROZEN) for name in of_kind(attempt.files, kind)]
    if len(files) < 2:
        return
    places = {tensor.name: name for name in files for tensor in attempt.files[name].tensors}
    total = sum(record.bytes for name in files for record in attempt.files[name].tensors)
    attempt.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _write_or_link(name: str, content: bytes, previous: Checkpoint | None, attempt: Attempt) -> None:
    record = previous.manifest.files.get(name) if previous else None
    earlier = previous.path / name if previous else None
    # compared, not trusted: a damaged copy is not handed on
    if record and earlier and earlier.is_file() and earlier.read_bytes() == content:
        attempt.link(name, earlier, record)
    else:
        attempt.write_bytes(name, content)


def _config(base_directory: Path, weights: str) -> dict[str, Any]:
    """The base's own config with the type of the weights that are really there, whatever the base's was."""
    config = json.loads((base_directory / "config.json").read_bytes())
    return base.with_dtype(config, base.DTYPES[weights])


def files_of(snapshot: Snapshot, is_first: bool = True) -> dict[str, list[Tensor]]:
    """The safetensors files of a checkpoint: of each tensor what this rank writes. What every rank has, the first one does."""
    copied = _tensors(snapshot.copy.tensors, snapshot.rows, is_first)
    buffers, frozen = (_tensors(each, snapshot.rows, is_first) for each in (snapshot.buffers, snapshot.frozen))
    weights, moments, average = (
        [replace(each, name=each.name.removeprefix(kind)) for each in copied if each.name.startswith(kind)]
        for kind in ("weights/", "moments/", "ema/")
    )
    if snapshot.adapter_config is not None:  # one file: peft reads no other
        return {ADAPTER: weights + buffers, **({EMA: average} if average else {}), **divided(OPTIMIZER, moments)}
    beside = [divided(kind, tensors) for kind, tensors in ((FROZEN, frozen), (EMA, average)) if tensors]
    of_model = divided(TRAINED if frozen else WHOLE, weights + buffers)
    return reduce(or_, [of_model, *beside, divided(OPTIMIZER, moments)])


def metadata_of(name: str) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    return {} if kind_of(name) == OPTIMIZER else {"format": "pt"}


def _tensors(live: dict[str, torch.Tensor], rows: dict[str, shards.Rows], is_first: bool = True) -> list[Tensor]:
    """The tensors as bytes that can be written."""
    made = []
    for name, tensor in live.items():
        own = rows.get(name)
        part = shards.local(tensor.detach()) if own or is_first else tensor.new_empty(0)
        data = memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        shape, first = (own.shape, own.first_number * tensor.element_size()) if own else (tuple(tensor.shape), 0)
        made.append(Tensor(name, base.STORED_DTYPES[tensor.dtype], shape, data, first))
    return made
