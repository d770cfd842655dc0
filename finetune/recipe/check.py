"""From plain values to a checked `Recipe`, or to all its problems in our own words.

pydantic finds the problems. This file adds the words, your own key in place of pydantic's location, and the nearest right key.
"""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune.recipe.schema import Recipe, Section
from finetune.recipe.schema.patterns import PatternError
from finetune.recipe.schema.rules import PartlyRead, problems
from finetune.recipe.yaml_nodes import NUMBER, Plain, shown

Complaint = tuple[str, str, str | None]
"""Dotted key, message, hint."""

# below these pydantic's locations also name the chosen variant
_TAGGED = re.compile(r"task|adapter|data\.holdout|track\.\d+|evaluate\.sets\.[^.]+\.metrics\.\d+")
_OF_A_SET = re.compile(r"^evaluate\.sets\.[^.\[]+")
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "`true` or `false`",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_YES_AND_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_OTHER_TRAINERS = {
    "gradient_checkpointing": "train.activation_checkpointing",
    "load_in_4bit": "base.quantization",
    "load_in_8bit": "base.quantization",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "max_seq_length": "task.max_length",
    "max_steps": "train.steps",
    "model": "base.checkpoint",
    "model_name_or_path": "base.checkpoint",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "r": "adapter.rank",
    "optim": "optimizer.name",
    "target_modules": "adapter.targets",
    "torch_compile": "train.compile",
    "warmup_ratio": "optimizer.warmup",
    "warmup_steps": "optimizer.warmup",
}


def check(data: dict[str, Plain]) -> Recipe | list[Complaint]:
    """The recipe, or everything that is wrong with it; combinations are checked as far as their sections are right."""
    sections: dict[str, Any] = {}
    try:
        return Recipe.model_validate(data, context=sections)
    except ValidationError as error:
        errors = [details for details in error.errors(include_url=False) if details["loc"]]
    complaints = [_complaint(details, data) for details in errors]
    hints = " ".join(hint or "" for _, message, hint in complaints if message == "unknown key")
    complaints = [each for each in complaints if each[1] != "is required" or f"`{each[0]}`" not in hints]
    misnamed = any(details["loc"][0] not in Recipe.model_fields for details in errors)
    if not misnamed:  # else a section that seems to be absent may be there under a wrong name
        optional = {name: field for name, field in Recipe.model_fields.items() if not field.is_required()}
        sections |= {name: field.get_default() for name, field in optional.items() if name not in data}
    for problem in problems(PartlyRead(**sections)):
        key, _, message = problem.partition(": ")
        message, _, hint = message.partition("\nhint: ")
        complaints.append((key, message, hint or None))
    return complaints


def _complaint(details: ErrorDetails, data: Plain) -> Complaint:
    """One of pydantic's errors in our words, at the key that the user wrote."""
    key, kind, value, context = _key(details["loc"], data), details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return key, "unknown key", _place_hint(key, str(details["loc"][-1]))
    if kind == "missing":
        return key, "is required", None
    if kind == "union_tag_not_found":
        return f"{key}.name", "is required", f"one of {_either(_tags(key))}"
    if kind == "union_tag_invalid":
        return _choice(f"{key}.name", _tags(key), value["name"] if isinstance(value, dict) else value)
    if kind == "literal_error":
        return _choice(key, re.findall(r"'([^']*)'", context["expected"]), value)
    if kind == "value_error":
        message = str(context["error"])
        if isinstance(context["error"], PatternError):
            return key, message, context["error"].hint
        hint = _type_hint(key, "bool_type", value) if "`true` or `false`" in message else None
        return key, message if isinstance(value, dict) else f"{message}, not {shown(value)}", hint
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return key, f"must be {words} {context[name]:g}, not {shown(value)}", None
    if kind in {"too_short", "string_too_short"}:
        return key, "must not be empty", None
    if kind in _WANTED:
        return key, f"must be {_WANTED[kind]}, not {shown(value)}", _type_hint(key, kind, value)
    return key, details["msg"], None


def _key(location: tuple[str | int, ...], data: Plain) -> str:
    """A dotted key, without what pydantic adds: names of variants, the index of an item without its list, the key of a list without its
    section."""
    key = ""
    for depth, part in enumerate(location):
        is_variant = _TAGGED.fullmatch(".".join(map(str, location[:depth])))
        if is_variant or (isinstance(part, str) and isinstance(data, list)):
            continue
        if isinstance(part, str):
            key = f"{key}.{part}" if key else part
            data = data.get(part) if isinstance(data, dict) else None
        elif isinstance(data, list):
            key = f"{key}[{part}]"
            data = data[part] if part < len(data) else None
    return key


def _choice(key: str, allowed: list[str], value: Plain) -> Complaint:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    return key, f"must be {_either(allowed)}, not {shown(value)}", f"did you mean `{near[0]}`?" if near else None


def _either(words: list[str]) -> str:
    *first, last = [f"`{word}`" for word in words]
    return f"{', '.join(first)} or {last}" if first else last


def _type_hint(key: str, kind: str, value: Plain) -> str | None:
    """What to do about a value of the wrong type."""
    if kind in {"int_type", "float_type"} and isinstance(value, str):
        if NUMBER.fullmatch(value):
            return "take away the quotes"
        bare = re.sub(r"[_, ]", "", value)
        return f"write it as `{bare}`" if NUMBER.fullmatch(bare) else None
    if kind == "int_type" and isinstance(value, float) and value.is_integer() and value < 1e15:
        return f"write it as `{value:.0f}`"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "put it in quotes"
    if kind == "bool_type" and str(value).lower() in _YES_AND_NO:
        return f"did you mean `{_YES_AND_NO[str(value).lower()]}`?"
    if kind == "list_type" and isinstance(value, dict):
        return "put `- ` before its first key"
    if kind == "list_type":
        items = _sections().get(f"{_item(key)}[0]")
        return (
            f"write it as `[{{{next(iter(items[0].model_fields))}: {value}}}]`" if items else f"write it as `[{value}]`"
        )
    return _keys_hint(key) if _WANTED[kind] == "a section with keys" else None


def _place_hint(key: str, name: str) -> str | None:
    """Where an unknown key belongs: the one with this name elsewhere, else the nearest here, else the nearest elsewhere."""
    section = key.removesuffix(name).removesuffix(".")
    here = _sections().get(_item(section), [])
    owner = next((variant for variant in here if name in variant.model_fields), None)
    if owner and (tag := get_args(owner.model_fields["name"].annotation)):
        return f"`{name}` goes with `name: {tag[0]}`"
    if name in _places():
        outer, _, inner = name.rpartition(".")
        return f"write it as `{outer}: {{{inner}: ...}}`"
    if name in _OTHER_TRAINERS:
        return f"did you mean `{_OTHER_TRAINERS[name]}`?"
    same = _places_of([name])
    near_here = difflib.get_close_matches(name, [field for variant in here for field in variant.model_fields], n=1)
    near_elsewhere = _places_of(
        difflib.get_close_matches(name, [place.rpartition(".")[2] for place in _places()], n=1, cutoff=0.75)
    )
    if 1 <= len(same) <= 3:  # a name like `every` or `path` that stands in many places says nothing
        near = same
    elif near_here:
        near = [f"{section}.{near_here[0]}" if section else near_here[0]]
    else:
        near = near_elsewhere[:3]
    return f"did you mean {_either(near)}?" if near else _keys_hint(section)


def _keys_hint(key: str) -> str | None:
    fields = dict.fromkeys(field for variant in _sections().get(_item(key), []) for field in variant.model_fields)
    return f"the keys here are {', '.join(f'`{field}`' for field in fields)}" if fields else None


def _item(key: str) -> str:
    """The key with every index 0 and without names of the user's, as `_sections` writes it."""
    return re.sub(r"\[\d+\]", "[0]", _OF_A_SET.sub("evaluate.sets", key))


def _tags(key: str) -> list[str]:
    # One that stands without its list has no index.
    variants = _sections().get(_item(key)) or _sections()[f"{_item(key)}[0]"]
    names = (get_args(variant.model_fields["name"].annotation) for variant in variants)
    return [name[0] for name in names if name]


def _places_of(names: list[str]) -> list[str]:
    return [place for place in _places() if place.rpartition(".")[2] in names]


@cache
def _places() -> list[str]:
    """Every dotted key of a recipe."""
    keys = (
        f"{section}.{field}"
        for section, variants in _sections().items()
        for variant in variants
        for field in variant.model_fields
    )
    return [key.removeprefix(".") for key in dict.fromkeys(keys)]


@cache
def _sections() -> dict[str, list[type[Section]]]:
    """The section, or its variants, at each dotted key; list items are `[0]`."""
    found: dict[str, list[type[Section]]] = {}
    for key, section in _walk(Recipe, ""):
        found.setdefault(key, []).append(section)
    return found


def _walk(annotation: object, key: str) -> Iterator[tuple[str, type[Section]]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield key, annotation
        for name, field in annotation.model_fields.items():
            yield from _walk(field.annotation, f"{key}.{name}".removeprefix("."))
    else:
        for argument in get_args(annotation):
            yield from _walk(argument, f"{key}[0]" if get_origin(annotation) is list else key)
