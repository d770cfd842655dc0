"""Floor 2. A ref to a live model: whatever a user can name, ready to evaluate, to generate with or to package.

A checkpoint of a run is verified first, every byte. Nothing here trains; `state` and `snapshot` do that.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import plan as plans
from finetune.checkpoints.manifest import Checkpoint, verify
from finetune.checkpoints.refs import Ref, find, parse
from finetune.errors import BaseError, CheckpointError
from finetune.model import adapter, base
from finetune.plan import Plan
from finetune.recipe.schema import Base


@dataclass(frozen=True)
class Opened:
    model: torch.nn.Module
    """In eval mode, fp32; an adapter is on its base, not merged."""
    directory: Path
    """Where tokenizer and generation config are."""
    base_directory: Path
    plan: Plan | None
    """The plan of the run it comes from, if it comes from one."""
    checkpoint: Checkpoint | None
    """None for a base or a plain model."""


def open_model(text: str, attention: str = "sdpa") -> Opened:
    """The model that a ref names."""
    ref = parse(text)
    if ref.kind == "base":
        plan, _ = plans.load(ref.run)
        directory = base.directory(plan.recipe.base, plan.base)
        return Opened(base.load_model(directory, attention=attention), directory, directory, plan, None)
    if ref.kind in ("run", "checkpoint"):
        return _open_checkpoint(find(ref), attention)
    if ref.kind == "model" and (ref.path / "adapter_config.json").exists():
        return _open_adapter(ref.path, attention)
    named = Base(checkpoint=text)
    directory = base.directory(named, base.pin(named))
    return Opened(base.load_model(directory, attention=attention), directory, directory, None, None)


def run_of(ref: Ref) -> Path | None:
    """The run directory that a ref leads to, if any: its own, or the one a checkpoint directory lies in."""
    if ref.run is not None:
        return ref.run
    inside = ref.path.absolute().parents[1] if ref.kind == "checkpoint" else None
    return inside if inside and (inside / "plan.json").exists() else None


def _open_checkpoint(checkpoint: Checkpoint, attention: str) -> Opened:
    damages = [damage for damage in verify(checkpoint.path) if damage.check != "extra"]
    if damages:
        first = damages[0]
        raise CheckpointError(
            f"{first.file}: {first.message}", where=str(checkpoint.path), hint="use another checkpoint of the run"
        )
    run = run_of(Ref("checkpoint", "", path=checkpoint.path))
    plan = plans.load(run)[0] if run else None
    if (checkpoint.path / "adapter_config.json").exists():
        if plan is None:
            raise CheckpointError("is an adapter whose run directory is not around it", where=str(checkpoint.path))
        base_directory = base.directory(plan.recipe.base, plan.base)
        model = adapter.attach(base.load_model(base_directory, attention=attention), checkpoint.path)
        return Opened(model.eval(), checkpoint.path, base_directory, plan, checkpoint)
    model = base.load_model(checkpoint.path, attention=attention)
    return Opened(model, checkpoint.path, checkpoint.path, plan, checkpoint)


def _open_adapter(path: Path, attention: str) -> Opened:
    """A plain peft directory, on the base that it names."""
    named = json.loads((path / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    if not named:
        raise BaseError(
            "is an adapter that does not name its base", where=str(path), hint="set base_model_name_or_path"
        )
    below = open_model(named, attention)
    model = adapter.attach(below.model, path).eval()
    has_tokenizer = (path / "tokenizer_config.json").exists()
    return Opened(model, path if has_tokenizer else below.directory, below.base_directory, None, None)
