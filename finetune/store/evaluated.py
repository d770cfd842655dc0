"""Digests of what an evaluation is about: the weights of a model, rows as they were encoded, and the settings beside them.

Each follows from plans and manifests alone, so a stored evaluation is found without the model. Weights are known by their content:
after a rollback, a kill or a branch, no result of other weights is taken.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import blake3

from finetune.recipe.schema import Base
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.tensor_files import is_for_resume

if TYPE_CHECKING:
    from finetune.plan.plan import PinnedBase, Plan

CONFIGS = ("config.json", "adapter_config.json")


def weights(files: Mapping[str, FileRecord], below: str) -> str:
    """Of a checkpoint with these files. `below` is the digest of the run's base: an adapter's figures depend on it."""
    model = {
        name: record.digest
        for name, record in files.items()
        if name in CONFIGS or (name.endswith(".safetensors") and not is_for_resume(name))
    }
    return _digest([model, below if "adapter_config.json" in files else None])


def base(named: Base, pinned: "PinnedBase") -> str:
    """Of a base. Equal for a run's step 0 and for the same checkpoint named alone."""
    decides = named.model_dump(mode="json", include={"random_weights", "rope"}, exclude_none=True)
    return _digest([pinned.model_dump(mode="json", exclude_none=True), decides])


def unsaved(run: str, attempt: str, step: int) -> str:
    """Of weights that an attempt at a run evaluated and never committed: nothing else can have it."""
    return f"{run}/{attempt}@{step}"


def rows(plan: "Plan", contents: str) -> str:
    """Of rows with this digest of their contents, encoded as the plan encodes them."""
    return _digest([plan.encoding, plan.date, contents])


def settings(plan: "Plan", own: "Plan | None") -> dict[str, str]:
    """Those of an evaluation with the recipe of `plan`; `own` is the plan of the run that trained the model, if a run did."""
    train = own.recipe.train if own else None
    return {
        "arrangement": plan.arrangement,
        "precision": plan.recipe.train.precision,
        "weights": train.weights if train else "fp32",
        "quantization": (own.quantization if own else None) or "none",
    }


def _digest(facts: object) -> str:
    return "blake3:" + blake3.blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()
