"""Types of values beyond plain ones: cadences, counts and shares, pairs, Hub ids; each with its own error message."""

import math
import re
from typing import Annotated, Literal, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Every(BaseModel):
    """A cadence in steps or in minutes."""

    model_config = ConfigDict(frozen=True)
    steps: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        if self.steps:
            return f"{self.steps} step{'' if self.steps == 1 else 's'}"  # as it is read: without commas
        return f"{self.minutes:g} minute{'' if self.minutes == 1 else 's'}"


def _every(value: object) -> object:
    if isinstance(value, Every):
        return value
    match = re.fullmatch(r"(\d+) steps?|(\d+(?:\.\d+)?) minutes?", value) if isinstance(value, str) else None
    if not match or float(match[1] or match[2]) <= 0:
        raise ValueError("must be like `100 steps` or `15 minutes`")
    return Every(steps=int(match[1])) if match[1] else Every(minutes=float(match[2]))


def _every_steps(value: object) -> object:
    if isinstance(value, Every) and value.steps:
        return value
    match = re.fullmatch(r"(\d+) steps?", value) if isinstance(value, str) else None
    if not match or int(match[1]) <= 0:
        raise ValueError("must be like `100 steps`")
    return Every(steps=int(match[1]))


def _share(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    share = value[:-1] if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value) else None
    if not is_count and share is None:
        raise ValueError("must be a count like `200` or a share like `3%`")
    if share is not None and float(share) > 100:
        raise ValueError("must be at most 100%")
    return value


def _rate(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
        if float(value[:-1]) > 100:
            raise ValueError("must be at most 100%")
        return value
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise ValueError("must be a rate like `2e-5` or a share like `10%`")
    return float(value)


def _weight(value: object) -> object:
    """One number over 0, or one for each stage, not all of them 0."""
    given = value if isinstance(value, list | tuple) else [value]
    numbers = [float(each) for each in given if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < len(given) or not any(numbers) or not all(0 <= each < math.inf for each in numbers):
        raise ValueError("must be a weight over 0 like `0.5`, or a list like `[1, 0.5, 0]`")
    return tuple(numbers) if isinstance(value, list | tuple) else numbers[0]


def _auto_or_count(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("must be `auto` or a count like `2048`")


def _auto_or_truth(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("must be `auto`, `true` or `false`")
    return value


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be two numbers like `[0.9, 0.999]`")
    return tuple(value)


def _router_loss(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if value not in ("off", "base") and not is_number:
        raise ValueError("must be `off`, `base`, or a number above 0")
    return float(cast(float, value)) if is_number else value


def _hub_id(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(_HUB_ID, value):
        raise ValueError("must be like `owner/name`")
    return value


def _scalar(value: object) -> object:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be text, a number, `true`, `false` or null")
    return value


class Short:
    """In a type: the JSON Schema also takes a short form of the value, which a validator makes the long one. A name is that of the one key
    that the short form gives."""

    def __init__(self, form: JsonSchemaValue | str):
        self._form = form

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        long = handler(core)
        short = (
            handler.resolve_ref_schema(long)["properties"][self._form] if isinstance(self._form, str) else self._form
        )
        return {"anyOf": [short, long]}


def listed(value: object) -> object:
    """One value as a list."""
    return value if isinstance(value, list | tuple) or value is None else [value]


_HUB_ID = r"[\w.-]+/[\w.-]+"
_EVERY_SCHEMA = {"type": "string", "pattern": r"^[0-9.]+ (steps?|minutes?)$"}
Cadence = Annotated[Every, BeforeValidator(_every), PlainSerializer(str), WithJsonSchema(_EVERY_SCHEMA)]
StepCadence = Annotated[
    Every,
    BeforeValidator(_every_steps),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+ steps?$"}),
]
CountOrShare = Annotated[
    int | str,
    BeforeValidator(_share),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}]}),
]
RateOrShare = Annotated[
    float | str,
    BeforeValidator(_rate),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}]}),
]
Weight = Annotated[
    float | tuple[float, ...],
    BeforeValidator(_weight),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1},
            ]
        }
    ),
]
AutoOrCount = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
Packing = Annotated[
    bool,
    BeforeValidator(_auto_or_truth),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "boolean"}]}),
    Field(json_schema_extra={"default": "auto"}),
]
"""`auto` is the state of a recipe that does not name it: plans of every age hold `true` there, and keep their ids."""
RouterLoss = Annotated[
    float | Literal["off", "base"],
    BeforeValidator(_router_loss),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"enum": ["off", "base"]}]}),
]
Beta = Annotated[float, Field(ge=0, lt=1)]
HubId = Annotated[str, BeforeValidator(_hub_id), WithJsonSchema({"type": "string", "pattern": f"^{_HUB_ID}$"})]

Names = Annotated[list[str], BeforeValidator(listed)]
"""One name, or a list of names."""
Cadences = Annotated[list[Cadence], BeforeValidator(listed)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_pair)]


Variable = Annotated[bool | int | float | str | None, Field(union_mode="left_to_right"), BeforeValidator(_scalar)]
"""A value of a template's variable."""


def members(family: object) -> dict[str, type]:
    """The sections of a family that `name` tells apart, by that name."""
    union, *_ = get_args(family)
    return {get_args(member.model_fields["name"].annotation)[0]: member for member in get_args(union)}


def count_of(value: int | str, total: int) -> int:
    """A count or a share like "3%" as a count of `total`; a share is rounded to the nearest whole."""
    return value if isinstance(value, int) else round(float(value[:-1]) / 100 * total)


def amount_of(value: float | str, total: float) -> float:
    """An amount, or a share like "10%" of `total`."""
    return float(value[:-1]) / 100 * total if isinstance(value, str) else value
