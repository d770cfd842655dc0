"""A checkpoint's tensors back into live state: of those that are spread over ranks, each rank reads its own rows."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.errors import CheckpointError
from finetune.model import adapters, shards
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.tensor_files import (
    ADAPTER,
    EMA,
    FROZEN,
    OPTIMIZER,
    TRAINED,
    WHOLE,
    kind_of,
    of_kind,
)
from finetune.training.state import TrainState


def read(state: TrainState, plan: Plan, checkpoint: Checkpoint) -> None:
    """Brings a state, at whatever step it is, to the checkpoint's step."""
    state.await_snapshot()
    kinds = [ADAPTER] if adapters.is_adapter(state.model) else [WHOLE, TRAINED, FROZEN]
    rows = {name: shards.rows_of(tensor) for name, tensor in adapters.weights(state.model).items()}
    files = checkpoint.manifest.files
    tensors: dict[str, torch.Tensor] = {}
    for kind in kinds:
        tensors |= _own(checkpoint, kind, rows)
    adapters.load_weights(state.model, tensors)
    if state.average:
        state.average.restore(_own(checkpoint, EMA, rows) if of_kind(files, EMA) else None)
    record = json.loads((checkpoint.path / "state.json").read_bytes())
    of_parameters = {name: shards.rows_of(parameter) for name, parameter in state.trainable.items()}
    moments = [each.name for name in of_kind(files, OPTIMIZER) for each in files[name].tensors]
    # Names of parameters have dots, keys of a state have none.
    rows = {name: of_parameters.get(name.rpartition(".")[0]) for name in moments}
    _restore_optimizer(state, _own(checkpoint, OPTIMIZER, rows), record["scalars"], checkpoint)
    state.step = record["step"]


def _own(checkpoint: Checkpoint, kind: str, rows: dict[str, shards.Rows | None]) -> dict[str, torch.Tensor]:
    """The tensors of the files of a kind; of those with rows here, these rows alone."""
    found: dict[str, torch.Tensor] = {}
    for name in of_kind(checkpoint.manifest.files, kind):
        found |= _of_file(checkpoint.path / name, rows)
    return found


def _of_file(path: Path, rows: dict[str, shards.Rows | None]) -> dict[str, torch.Tensor]:
    if not any(rows.values()):
        return load_file(path)
    with safe_open(path, "pt") as file:
        return {
            name: file.get_slice(name)[own.first : own.end] if (own := rows.get(name)) else file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 it is no dictionary
        }


def stored_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by the names that `Live.copied` gives them."""
    found: dict[str, torch.Tensor] = {}
    for path in checkpoint.path.glob("*.safetensors"):
        kind = {OPTIMIZER: "moments", EMA: "ema"}.get(kind_of(path.name), "weights")
        found |= {f"{kind}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


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
                slots[key] = shards.placed(moments[full_name], parameter)
            else:
                # torch's optimizers count their updates in fp32.
                slots[key] = torch.tensor(scalars[full_name], dtype=torch.float32, device=parameter.device)
            expected.discard(full_name)
        if slots:
            state.optimizer.state[parameter] = slots
    # These moments are of another model. Without them the updates would differ, silently.
    if expected:
        raise CheckpointError(f"has moments of unknown parameters: {sorted(expected)[:3]}", where=str(checkpoint.path))
