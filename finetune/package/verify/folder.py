"""A model folder for `checks`: configs as JSON, headers by our own reader. It must use nothing of transformers and run nothing."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError
from finetune.package.verify.contents import Finding
from finetune.store.strict_json import from_json
from finetune.store.tensors import Place, read_header

PROCESSORS = "*processor_config.json"  # for images, video and sound
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json", PROCESSORS)
RECORD = "training/probe.json"


@dataclass
class Folder:
    """A model folder, read once. `broken` has the unreadable files."""

    path: Path
    broken: list[Finding] = field(default_factory=list)

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name in sorted({path.name for pattern in CONFIGS for path in self.path.glob(pattern) if path.is_file()}):
            value = self.json(name, "config")
            if isinstance(value, dict):
                found[name] = value
            elif value is not None:
                self.broken.append(Finding("config", name, None, "is not a JSON object"))
        return found

    @cached_property
    def from_base(self) -> dict[str, Any] | None:
        """Tensors that our package has unchanged from its base (`FromBase`); None in other models, and in packages of older code."""
        value = self.json(RECORD, "config") if (self.path / RECORD).is_file() else None
        found = value.get("from_base") if isinstance(value, dict) else None
        return found if isinstance(found, dict) else None

    @cached_property
    def tensors(self) -> dict[str, dict[str, Place]]:
        """By file."""
        found = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                found[file.name] = read_header(file)
            except (CheckpointError, OSError) as error:
                self.broken.append(Finding("header", file.name, None, getattr(error, "message", str(error))))
        return found

    @property
    def config(self) -> dict[str, Any]:
        return self.configs.get("config.json", {})

    @property
    def is_adapter(self) -> bool:
        return "adapter_config.json" in self.configs

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Ids of the tokenizer's tokens, added ones included; empty without a tokenizer.json."""
        value = self.json("tokenizer.json", "tokenizer") if (self.path / "tokenizer.json").is_file() else None
        if not isinstance(value, dict):
            return {}
        known = (value.get("model") or {}).get("vocab") or {}
        tokens = dict(known) if isinstance(known, dict) else {one[0]: place for place, one in enumerate(known)}
        return tokens | {token["content"]: token["id"] for token in value.get("added_tokens") or []}

    def json(self, name: str, check: str) -> object:
        try:
            return from_json((self.path / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            self.broken.append(Finding(check, name, None, f"is not valid JSON: {error}"))
            return None

    def first(self, pattern: re.Pattern[str]) -> tuple[str, str, Place] | None:
        """File, name and place of the first tensor with one of these names."""
        found = ((file, name, place) for file, places in self.tensors.items() for name, place in places.items())
        return next((item for item in found if pattern.search(item[1])), None)
