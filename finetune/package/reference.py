"""Reference logits of a package, small enough to travel with it; `verify` computes them again.

For each probe sequence: the likeliest tokens at some positions with their logits, and a hash of all logits. On equal hardware and
libraries they are equal to the bit, elsewhere close.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
import transformers
from transformers import PreTrainedModel

from finetune.errors import PackageError
from finetune.model import base
from finetune.package import probe, proof
from finetune.package.proof import Logits
from finetune.package.verify.contents import Finding
from finetune.package.verify.folder import Folder
from finetune.recipe.schema import Base
from finetune.tasks.rendering import prints_date

FILE = "training/probe.json"
EVERY, TOP = 8, 5
# Of the largest logit: other hardware sums in another order, and bf16 keeps 8 bits of each sum.
TOLERANCES = {"F32": 1e-3, "BF16": 5e-2}


class Likeliest(TypedDict):
    """The likeliest tokens at a position of a probe sequence, with their logits."""

    row: int
    position: int
    tokens: list[int]
    logits: list[float]


class FromBase(TypedDict):
    """What a package has from its base as it was there."""

    types: dict[str, str]
    """Of tensors that most others do not have."""
    zeros: list[str]
    processors: list[str]


class Recorded(TypedDict):
    dtype: str
    day: str
    sha256: dict[str, str]
    likeliest: dict[str, list[Likeliest]]
    trained_class: NotRequired[str]
    """Of a model that also reads images or sound."""
    from_base: NotRequired[FromBase]


def recorded(logits: Logits, dtype: str, text_of: str | None = None) -> Recorded:
    """`dtype` is that of most weights, in safetensors' spelling; `text_of` is the plan's."""
    own: Recorded = {
        "dtype": dtype,
        "day": probe.DAY.date().isoformat(),
        "sha256": {name: _hash(one) for name, one in logits.items()},
        "likeliest": {name: _likeliest(one) for name, one in logits.items()},
    }
    return {**own, "trained_class": text_of} if text_of else own


def findings(directory: Path) -> Iterator[Finding]:
    """Loads the model in a fresh process, and returns the differences from its reference. Only for folders that passed the other checks.
    Raises BaseError if an adapter's base is unavailable."""
    try:
        said = json.loads((directory / FILE).read_text(encoding="utf-8"))
        loaded = proof.load_back(directory, _base(directory), *_class(said))
        now = recorded(loaded.logits, said["dtype"])
        if now["sha256"] == said["sha256"]:
            return
        said_of = said["likeliest"]
        if "day" not in said and prints_date(loaded.facts["template"]["source"]):
            said_of.pop("question", None)  # older code used the day of the packaging, which is unknown
        for name, one in said_of.items():
            yield from _compared(name, one, loaded.logits[name], TOLERANCES[said["dtype"]])
    except PackageError as error:
        yield Finding("load", "", None, error.message.removeprefix("load: "))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        yield Finding("logits", FILE, None, f"cannot be read: {error!r}")


def _compared(name: str, said: list[Likeliest], logits: torch.Tensor, tolerance: float) -> Iterator[Finding]:
    largest = max(abs(value) for item in said for value in item["logits"])
    for item in said:
        now = logits[item["row"], item["position"], item["tokens"]]
        distance = (now - torch.tensor(item["logits"])).abs().max().item()
        if not distance <= tolerance * max(largest, 1.0):
            where = f"{name} {item['row']}, position {item['position']}"
            yield Finding("logits", FILE, None, f"the model computes other logits: {distance:.3g} apart at {where}")
            return


def _likeliest(logits: torch.Tensor) -> list[Likeliest]:
    found: list[Likeliest] = []
    for row in range(logits.shape[0]):
        for position in range(EVERY - 1, logits.shape[1], EVERY):
            values, tokens = logits[row, position].topk(min(TOP, logits.shape[-1]))
            found.append({"row": row, "position": position, "tokens": tokens.tolist(), "logits": values.tolist()})
    return found


def _class(said: Recorded) -> list[str]:
    """The trained class, if it is not a causal LM. ValueError where the record, which came with the package, names something other than a model."""
    name = said.get("trained_class")
    if name is not None and not issubclass(getattr(transformers, str(name), object), PreTrainedModel):
        raise ValueError(f"{name} is no class of a model")
    return [name] if name else []


def _hash(logits: torch.Tensor) -> str:
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


def _base(directory: Path) -> Path | None:
    """The base of an adapter, from the Hub or its cache."""
    config = Folder(directory).configs.get("adapter_config.json")
    if config is None:
        return None
    revision = f"@{config['revision']}" if config.get("revision") else ""
    named = Base(checkpoint=f"{config['base_model_name_or_path']}{revision}")
    return base.directory(named, base.pin(named))
