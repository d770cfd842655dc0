"""Floor 3. Live state to and from the files of a checkpoint; the only code that knows both torch and the format.

Every checkpoint directory loads with plain `from_pretrained` (peft's, for an adapter). `run` calls `write` inside an
attempt of the store, and `read` on a verified checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.checkpoints.staging import Copy, Staging
from finetune.checkpoints.store import Attempt, Checkpoint
from finetune.checkpoints.tensors import Tensor
from finetune.errors import CheckpointError
from finetune.model import adapter, base
from finetune.plan import Plan
from finetune.state import TrainState

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
# The small files that travel with weights, byte for byte; what is not named here stays where it is.
COMPANIONS = (*base.TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Snapshot:
    """A state at one step: its tensors are being copied, and all else is here."""

    step: int
    is_adapter: bool
    adapter_config: dict | None
    copy: Copy
    """Weights as `weights/<name>`, moments as `moments/<name>`."""
    scalars: dict[str, float]


def take(state: TrainState, plan: Plan, staging: Staging) -> Snapshot:
    """Begins a snapshot; `state.await_snapshot` ends the copying, and must come before anything writes weights."""
    is_adapter = adapter.is_adapter(state.model)
    moments, scalars = _optimizer_state(state)
    live = {f"weights/{name}": tensor for name, tensor in adapter.weights(state.model).items()}
    live |= {f"moments/{name}": tensor for name, tensor in moments.items()}
    state.copy = staging.take(live)
    config = adapter_config(state.model, plan) if is_adapter else None
    return Snapshot(state.step, is_adapter, config, state.copy, scalars)


def write(snapshot: Snapshot, plan: Plan, base_directory: Path, previous: Checkpoint | None, attempt: Attempt) -> None:
    """All files of a checkpoint but its manifest. What cannot change is linked from the checkpoint before."""
    snapshot.copy.wait()
    if snapshot.is_adapter:
        attempt.write_tensors("adapter_model.safetensors", _tensors(snapshot, "weights/"), {"format": "pt"})
        attempt.write_json("adapter_config.json", snapshot.adapter_config)
    else:
        attempt.write_tensors("model.safetensors", _tensors(snapshot, "weights/"), {"format": "pt"})
        attempt.write_json("config.json", _config(base_directory))
    attempt.write_tensors("optimizer.safetensors", _tensors(snapshot, "moments/"), {})
    record = {"step": snapshot.step, "optimizer": plan.recipe.optimizer.name, "scalars": snapshot.scalars}
    attempt.write_json("state.json", record)
    for file in companions(base_directory):
        _write_or_link(file, previous, attempt)


def read(state: TrainState, plan: Plan, checkpoint: Checkpoint) -> None:
    """Brings a state at step 0 to the checkpoint's step."""
    weights = "adapter_model.safetensors" if adapter.is_adapter(state.model) else "model.safetensors"
    adapter.load_weights(state.model, load_file(checkpoint.path / weights))
    record = json.loads((checkpoint.path / "state.json").read_bytes())
    _restore_optimizer(state, load_file(checkpoint.path / "optimizer.safetensors"), record["scalars"], checkpoint)
    state.step = record["step"]


def companions(directory: Path) -> list[Path]:
    """The small files that travel with weights: tokenizer, chat template, generation config."""
    return [directory / name for name in COMPANIONS if (directory / name).is_file()]


def _write_or_link(file: Path, previous: Checkpoint | None, attempt: Attempt) -> None:
    content = file.read_bytes()
    earlier = previous.path / file.name if previous else None
    # compared, not trusted: a damaged copy is not handed on
    if earlier and file.name in previous.manifest.files and earlier.is_file() and earlier.read_bytes() == content:
        attempt.link(file.name, earlier, previous.manifest.files[file.name])
    else:
        attempt.write_bytes(file.name, content)


def adapter_config(model: torch.nn.Module, plan: Plan) -> dict:
    """peft's config of the adapter; the base is named by Hub id and commit, or as in the recipe, never by a path of this machine."""
    config = model.peft_config[adapter.NAME].to_dict()
    named = plan.recipe.base.origin or plan.recipe.base.checkpoint
    is_hub = plan.base.kind == "hub" or plan.recipe.base.origin
    config["base_model_name_or_path"] = named.partition("@")[0] if is_hub else Path(named).name
    config["revision"] = plan.base.revision
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _config(base_directory: Path) -> dict:
    """The base's own config with the type of the weights that are really there: fp32, whatever the base was."""
    config = json.loads((base_directory / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    return config | {"dtype": "float32"}


def _tensors(snapshot: Snapshot, prefix: str) -> list[Tensor]:
    return [
        Tensor(
            name.removeprefix(prefix),
            DTYPES[tensor.dtype],
            tuple(tensor.shape),
            memoryview(tensor.reshape(-1).view(torch.uint8).numpy()),
        )
        for name, tensor in snapshot.copy.tensors.items()
        if name.startswith(prefix)
    ]


def _optimizer_state(state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Moments by `<parameter name>.<state key>`, and single numbers (the update counter) by the same kind of name."""
    moments, scalars = {}, {}
    for name, parameter in state.trainable.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if value.ndim == 0:
                scalars[f"{name}.{key}"] = value.item()
            else:
                moments[f"{name}.{key}"] = value
    return moments, scalars


def _restore_optimizer(state: TrainState, moments: dict, scalars: dict[str, float], checkpoint: Checkpoint) -> None:
    expected = set(moments) | set(scalars)
    for name, parameter in state.trainable.items():
        slots = {}
        for full_name in [key for key in expected if key.rpartition(".")[0] == name]:
            key = full_name.rpartition(".")[2]
            if full_name in moments:
                slots[key] = moments[full_name].to(parameter.device)
            else:
                slots[key] = torch.tensor(scalars[full_name], dtype=torch.float32, device=parameter.device)
            expected.discard(full_name)
        if slots:
            state.optimizer.state[parameter] = slots
    if expected:
        raise CheckpointError(f"has moments of unknown parameters: {sorted(expected)[:3]}", where=str(checkpoint.path))
