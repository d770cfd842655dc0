"""Live state to and from the files of a checkpoint; the only code that knows both torch and the format.

Every checkpoint directory loads with plain `from_pretrained` (peft's, for an adapter). `saver` calls `write` inside an
attempt of the store, `run` calls `read` on a verified checkpoint.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.errors import CheckpointError
from finetune.model import adapters, base
from finetune.plan import disk
from finetune.plan.plan import Plan
from finetune.store import tensors as safetensors
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.store import Attempt, Checkpoint
from finetune.store.durable import failures, replacing
from finetune.store.tensors import Tensor
from finetune.training.saving.buffers import Copy, Staging
from finetune.training.state import TrainState

# Weights that are trained, and those that cannot change, when there are both; the index names them for `from_pretrained`.
WHOLE, TRAINED, FROZEN = "model.safetensors", "model-trained.safetensors", "model-frozen.safetensors"
INDEX = f"{WHOLE}.index.json"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A state at one step: its tensors are being copied, and all else is here."""

    step: int
    adapter_config: dict[str, Any] | None
    """None where whole weights are trained."""
    copy: Copy
    """Trained weights as `weights/<name>`, moments as `moments/<name>`."""
    buffers: dict[str, torch.Tensor]
    """What a forward may change, already copied."""
    frozen: dict[str, torch.Tensor]
    """Weights that cannot change, as they are in the model."""
    scalars: dict[str, float]


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
        self._parameters = state.trainable
        self._optimizer = state.optimizer

    def copied(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What is copied in the background (weights as `weights/<name>`, moments as `moments/<name>.<key>`), and single numbers."""
        found = {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        live = {f"weights/{name}": tensor for name, tensor in self.trained.items()}
        live |= {f"moments/{name}": value for name, value in found.items() if value.ndim}
        counters = {name: value for name, value in found.items() if not value.ndim}
        numbers = torch.stack(list(counters.values())).tolist() if counters else []  # one read of the device for all
        return live, dict(zip(counters, numbers, strict=True))


def take(state: TrainState, live: Live, plan: Plan, staging: Staging) -> Snapshot:
    """Begins a snapshot; `state.await_snapshot` ends the copying, and must come before anything writes weights."""
    # One copy at a time: an update waits for `state.copy`, and knows of no other.
    state.await_snapshot()
    tensors, scalars = live.copied()
    state.copy = staging.take(tensors)
    config = adapters.config_of(state.model, plan) if adapters.is_adapter(state.model) else None
    # Small, and written by the next forward, which nothing makes wait: copied at once.
    buffers = {name: tensor.detach().clone().cpu() for name, tensor in live.buffers.items()}
    return Snapshot(state.step, config, state.copy, buffers, live.frozen, scalars)


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
    weights = _tensors(snapshot.copy.tensors, "weights/") + _tensors(snapshot.buffers)
    if snapshot.adapter_config is not None:
        attempt.write_tensors(ADAPTER, weights, {"format": "pt"})
        attempt.write_json("adapter_config.json", snapshot.adapter_config)
    else:
        _write_model(snapshot, weights, previous, attempt)
        attempt.write_json("config.json", _config(companions.directory, plan.recipe.train.weights))
    attempt.write_tensors("optimizer.safetensors", _tensors(snapshot.copy.tensors, "moments/"), {})
    record = {"step": snapshot.step, "optimizer": plan.recipe.optimizer.name, "scalars": snapshot.scalars}
    attempt.write_json("state.json", record)
    for name, content in companions.contents(with_config=snapshot.adapter_config is not None).items():
        _write_or_link(name, content, previous, attempt)


def read(state: TrainState, plan: Plan, checkpoint: Checkpoint) -> None:
    """Brings a state, at whatever step it is, to the checkpoint's step."""
    state.await_snapshot()
    names = [ADAPTER] if adapters.is_adapter(state.model) else [WHOLE, TRAINED, FROZEN]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if name in checkpoint.manifest.files:
            tensors |= load_file(checkpoint.path / name)
    adapters.load_weights(state.model, tensors)
    record = json.loads((checkpoint.path / "state.json").read_bytes())
    _restore_optimizer(state, load_file(checkpoint.path / "optimizer.safetensors"), record["scalars"], checkpoint)
    state.step = record["step"]


def stored_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by the names that `Live.copied` gives them."""
    found: dict[str, torch.Tensor] = {}
    for path in checkpoint.path.glob("*.safetensors"):
        kind = "moments" if path.name == "optimizer.safetensors" else "weights"
        found |= {f"{kind}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


class _OtherWeightsError(Exception):
    """The base has other weights than were committed."""


def restore_frozen(live: Live, checkpoint: Checkpoint) -> bool:
    """Rewrites the frozen weights of a checkpoint from the base's, if they are what its manifest speaks of."""
    record = checkpoint.manifest.files[FROZEN]
    path = checkpoint.path / FROZEN
    with suppress(_OtherWeightsError), failures(path), replacing(path) as file:
        records = safetensors.write(file, _tensors(live.frozen), {"format": "pt"})
        # Raised within `replacing`, so that the damaged file stays for you to look at.
        if FileRecord(file.bytes, file.digest(), tuple(records)) != record:
            raise _OtherWeightsError
        return True
    return False


def stored_bytes(snapshot: Snapshot, previous: Checkpoint | None) -> int:
    """What a commit of the snapshot adds to the disk; what the first one shares with later ones at the large end."""
    shared = 0 if previous else disk.COMPANION_BYTES + sum(tensor.nbytes for tensor in snapshot.frozen.values())
    return snapshot.copy.bytes + shared


def _write_model(snapshot: Snapshot, weights: list[Tensor], previous: Checkpoint | None, attempt: Attempt) -> None:
    if not snapshot.frozen:
        attempt.write_tensors(WHOLE, weights, {"format": "pt"})
        return
    attempt.write_tensors(TRAINED, weights, {"format": "pt"})
    earlier = previous.manifest.files.get(FROZEN) if previous else None
    if previous and earlier:
        attempt.link(FROZEN, previous.path / FROZEN, earlier)
    else:
        attempt.write_tensors(FROZEN, _tensors(snapshot.frozen), {"format": "pt"})
    places = dict.fromkeys((tensor.name for tensor in weights), TRAINED) | dict.fromkeys(snapshot.frozen, FROZEN)
    total = sum(record.bytes for name in (TRAINED, FROZEN) for record in attempt.files[name].tensors)
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


def _tensors(live: dict[str, torch.Tensor], prefix: str = "") -> list[Tensor]:
    """The tensors whose names begin with the prefix, without it, as bytes that can be written."""
    return [
        Tensor(
            name.removeprefix(prefix),
            base.STORED_DTYPES[tensor.dtype],
            tuple(tensor.shape),
            memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data),
        )
        for name, tensor in live.items()
        if name.startswith(prefix)
    ]


def _restore_optimizer(
    state: TrainState, moments: dict[str, torch.Tensor], scalars: dict[str, float], checkpoint: Checkpoint
) -> None:
    expected = set(moments) | set(scalars)
    # A rollback comes here with the moments of later steps.
    state.optimizer.state.clear()
    for name, parameter in state.trainable.items():
        slots = {}
        # Names of parameters have dots, keys of a state have none.
        for full_name in [key for key in expected if key.rpartition(".")[0] == name]:
            key = full_name.rpartition(".")[2]
            if full_name in moments:
                slots[key] = moments[full_name].to(parameter.device)
            else:
                # torch's optimizers count their updates in fp32.
                slots[key] = torch.tensor(scalars[full_name], dtype=torch.float32, device=parameter.device)
            expected.discard(full_name)
        if slots:
            state.optimizer.state[parameter] = slots
    # These moments are of another model. Without them the updates would differ, silently.
    if expected:
        raise CheckpointError(f"has moments of unknown parameters: {sorted(expected)[:3]}", where=str(checkpoint.path))
