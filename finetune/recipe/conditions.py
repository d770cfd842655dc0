"""The conditions of a source's `where`, like `language == en and meta.score >= 0.5`: a small grammar of our own, never Python's.

conditions = condition {"and" condition}
condition  = column ("==" | "!=" | "<" | "<=" | ">" | ">=") value | column "in" "[" value {"," value} "]"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

_OrderedT = TypeVar("_OrderedT", str, float)
Value = str | int | float | bool | None
"""What a recipe can name in a condition."""

_TOKEN = re.compile(
    r"""\s*(?: (?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
    | (?P<sign>==|!=|<=|>=|<|>|=|[\[\](),])
    | (?P<word>[^\s\[\](),<>=!"'`]+) )""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_LITERALS: dict[str, Value] = {"true": True, "false": False, "null": None}
OPERATORS = ("==", "!=", "<", "<=", ">", ">=", "in")
_ABSENT = object()
MOST_DIGITS = 1000  # of a whole number that is compared exactly


class ComparisonError(ValueError):
    """A value that has no order with the one in the recipe."""


@dataclass(frozen=True)
class Condition:
    column: str
    """As written: a column, or the dotted path of a field in it."""
    operator: str
    values: tuple[Value, ...]
    """One, or those of `in`."""
    is_quoted: bool = False
    """Whether the column's name was quoted: it is then no path."""

    def found_in(self, row: Mapping[str, object]) -> tuple[bool, object]:
        """Whether the row has the column, and its value; an absent one is None."""
        if self.column in row or self.is_quoted:
            return self.column in row, row.get(self.column)
        value: object = row
        for name in self.column.split("."):
            value = _field(value, name)
        return value is not _ABSENT, None if value is _ABSENT else value

    def keeps(self, value: object) -> bool:
        """Whether the condition is true of a value. Raises ComparisonError where the two have no order."""
        if self.operator in ("==", "in"):
            return any(_is_equal(value, each) for each in self.values)
        if self.operator == "!=":
            return not _is_equal(value, self.values[0])
        return value is not None and _is_ordered(value, self.operator, self.values[0])


class _Token(NamedTuple):
    kind: str
    """`quoted`, `sign` or `word`."""
    text: str


def parse(text: str) -> tuple[Condition, ...]:
    """The conditions, all of which have to be true. Raises ValueError with what is wrong."""
    tokens, found = _tokens(text), []
    while True:
        found.append(_condition(tokens))
        if not tokens:
            return tuple(found)
        joint = tokens.pop(0)
        if joint.text != "and" or joint.kind != "word":
            raise ValueError(_joint_problem(joint.text))


def _tokens(text: str) -> list[_Token]:
    found, place = [], 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if match is None:
            rest = text[place:].strip()
            raise ValueError(f"has a quote that does not end: `{rest}`" if rest[0] in "\"'`" else _unread(rest))
        kind = match.lastgroup or ""
        found.append(_Token(kind, match[kind]))
        place = match.end()
    return found


def _unread(rest: str) -> str:
    return f"cannot be read from `{rest[:20]}` on: it must be like `column == value`"


def _condition(tokens: list[_Token]) -> Condition:
    if not tokens:
        raise ValueError("must be like `column == value`, with `and` only between conditions")
    column, is_quoted = _unquoted(tokens.pop(0))
    operator = tokens.pop(0).text if tokens else ""
    if operator not in OPERATORS:
        better = "; equality is `==`" if operator == "=" else ""
        raise ValueError(f"needs one of {' '.join(OPERATORS)} after `{column}`{better}")
    if operator == "in":
        return Condition(column, operator, tuple(_list(tokens, column)), is_quoted)
    value = _value(tokens, f"`{column} {operator}`")
    if operator in ("<", "<=", ">", ">=") and (value is None or isinstance(value, bool)):
        raise ValueError(f"`{operator}` needs a number or text, for `{column}`")
    return Condition(column, operator, (value,), is_quoted)


def _list(tokens: list[_Token], column: str) -> list[Value]:
    closing = {"[": "]", "(": ")"}.get(tokens.pop(0).text if tokens else "")
    if closing is None:
        raise ValueError(f"needs a list after `{column} in`, like `[en, de]`")
    found = [_value(tokens, f"`{column} in`")]
    while tokens and tokens[0].text == ",":
        tokens.pop(0)
        found.append(_value(tokens, f"`{column} in`"))
    if not tokens or tokens.pop(0).text != closing:
        raise ValueError(f"has a list without `{closing}` after `{column} in`")
    return found


def _value(tokens: list[_Token], after: str) -> Value:
    if not tokens or tokens[0].kind == "sign":
        raise ValueError(f"needs a value after {after}")
    token = tokens.pop(0)
    if token.kind == "quoted":
        return _unquoted(token)[0]
    if token.text in _LITERALS:
        return _LITERALS[token.text]
    if _NUMBER.fullmatch(token.text):
        return _of_digits(token.text)
    return token.text


def _unquoted(token: _Token) -> tuple[str, bool]:
    if token.kind == "sign":
        raise ValueError(f"needs a column before `{token.text}`")
    if token.kind == "word":
        return token.text, False
    return re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL), True


def _joint_problem(joint: str) -> str:
    if joint == "or":
        return "has `or`: list the values with `in [...]`, or give two sources"
    if joint in ("&&", "&"):
        return f"has `{joint}`: conditions are joined by `and`"
    return f"has `{joint}` where `and` is expected; put quotes around text of several words"


def _field(value: object, name: str) -> object:
    if isinstance(value, Mapping):
        return value.get(name, _ABSENT)
    if isinstance(value, list) and name.isdecimal():
        return value[int(name)] if int(name) < len(value) else _ABSENT
    return _ABSENT


def _is_equal(value: object, named: Value) -> bool:
    """A number or a truth value is also found as text: a CSV file has nothing else. Null equals only null."""
    if named is None or value is None:
        return named is value
    if isinstance(named, bool):
        return value is named or (isinstance(value, str) and value.lower() == str(named).lower())
    if isinstance(named, int | float):
        return _number(value) == named
    return value == named


def _is_ordered(value: object, operator: str, named: Value) -> bool:
    if isinstance(named, str) and isinstance(value, str):
        return _compared(value, operator, named)
    if isinstance(named, int | float) and (number := _number(value)) is not None:
        return _compared(number, operator, named)
    raise ComparisonError


def _compared(one: _OrderedT, operator: str, two: _OrderedT) -> bool:
    if operator in ("<", "<="):
        return one < two or (operator == "<=" and one == two)
    return one > two or (operator == ">=" and one == two)


def _of_digits(text: str) -> int | float:
    """The number that a text spells. Python refuses to read a whole number of thousands of digits."""
    return float(text) if re.search(r"[.eE]", text) or len(text) > MOST_DIGITS else int(text)


def _number(value: object) -> int | float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return _of_digits(value.strip())
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
