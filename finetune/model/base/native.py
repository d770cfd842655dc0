"""A base as transformers reads it natively: without its own code and the mapping to it (`auto_map`), with a fast tokenizer.

The code is never imported. Nothing that is made of the base has the mapping, so no later loader runs the code either.
"""

import json
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from finetune.errors import BaseError
from finetune.model.base import tekken, view
from finetune.model.base.damaged import name_of, read_json

MAPPING = "auto_map"
CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
CONFIGS = (CONFIG, "generation_config.json", TOKENIZER, "*processor_config.json")
HINT = "choose a base that transformers knows"


def readable(directory: Path, below: Path | None = None) -> Path:
    """The directory itself, or a view of it in the cache: no mapping in its configs, no Python file, a tekken.json converted, all else
    linked.

    `below` is the base of an adapter. BaseError if transformers lacks the type or the class of the base.
    """
    configs = {file.name: read_json(file) for file in _configs(directory)}
    mapped = [name for name, config in configs.items() if _without(config) != config]
    made, type_of = tekken.converted(directory), below or directory
    if not (mapped or made) or not (type_of / CONFIG).is_file():
        return directory
    origin: view.Origin = {
        "name": name_of(directory),
        "source": str(directory.resolve()),
        "ignored": mapped,
        "type": _native_type(type_of, f"`{MAPPING}` in {mapped[0]}") if mapped else "",
        "tokenizer": _own_tokenizer(configs.get(TOKENIZER, {})),
    }
    there = {file.name for file in made}
    cleaned = {name: f"{json.dumps(_without(configs[name]), indent=2)}\n" for name in mapped if name not in there}
    gone = [tekken.FILE] if made else []
    return view.view(view.NATIVE, directory, cleaned, origin, made=made, without=gone)


def notes(directory: Path) -> list[str]:
    """A line about the code that is ignored; none for other directories."""
    origin = view.origin_of(directory)
    if origin is None or not origin["ignored"]:
        return []
    where = ", ".join(origin["ignored"])
    return [f"the base's own code (`{MAPPING}` in {where}) is ignored: transformers has `{origin['type']}` itself"]


def refuse_own_tokenizer(directory: Path) -> None:
    """BaseError if only the base's own code can make its tokenizer."""
    origin = view.origin_of(directory)
    if origin and origin["tokenizer"] and not (directory / "tokenizer.json").is_file():
        message = f"has a tokenizer of its own code (`{origin['tokenizer']}`), which is never run"
        raise BaseError(message, where=origin["name"], hint="add a tokenizer.json, which needs no code")


def _configs(directory: Path) -> list[Path]:
    return sorted(file for pattern in CONFIGS for file in directory.glob(pattern) if file.is_file())


def _without(value: object) -> object:
    """The value without mappings, on every level."""
    if isinstance(value, list):
        return [_without(item) for item in value]
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key != MAPPING}
    return value


def _native_type(directory: Path, asked: str) -> str:
    """The type in a config; BaseError if transformers lacks it, or the model class that the config declares."""
    config = read_json(directory / CONFIG)
    kind, declared = str(config.get("model_type")), config.get("architectures")
    lacking = f"type `{kind}`" if kind not in CONFIG_MAPPING_NAMES else None
    names = [str(name) for name in declared] if isinstance(declared, list) else []
    # MPT's files spell their class in another case.
    if names and not lacking and not _known() & {name.casefold() for name in names}:
        lacking = f"class `{names[0]}`"
    if lacking:
        message = f"needs its own code ({asked}), which is never run, and transformers has no {lacking}"
        raise BaseError(message, where=name_of(directory), hint=HINT)
    return kind


def _known() -> set[str]:
    return {name.casefold() for name in dir(transformers)}


def _own_tokenizer(config: dict[str, object]) -> str | None:
    """The class of a tokenizer with a mapping, if transformers lacks it."""
    name = config.get("tokenizer_class")
    if MAPPING not in config or (isinstance(name, str) and name.casefold() in _known()):
        return None
    return str(name or "AutoTokenizer")
