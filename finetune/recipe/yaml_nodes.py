"""YAML text to nodes with line numbers, and `--set` written into them.

YAML 1.2's core schema decides the type of a plain word: `2e-4` is a number, only true and false are booleans, `no` is text. Anchors,
aliases and tags are refused: an alias can turn kilobytes into gigabytes, and a tag can name code.
"""

import re
from dataclasses import dataclass
from typing import NoReturn, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, MappingStartEvent, NodeEvent, ScalarEvent

from finetune.errors import Problem, RecipeError

MAX_BYTES = 65_536
MAX_BRACKETS = 1_000  # ruamel.yaml's scanner is quadratic in open brackets: 60,000 of them take two minutes
MAX_DEPTH = 16

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]

NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")  # longer ones would not fit 64 bits; they become floats
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = {"", "~", "null", "Null", "NULL"}
_OVERRIDE_KEY = re.compile(r"[\w-]+(\.[\w-]+|\[[0-9]{1,9}\])*")


@dataclass
class Node:
    line: int
    """The line of the key, or of the list item; 0 for what `--set` wrote."""
    value: "Scalar | list[Node] | dict[str, Node]"


@dataclass
class Document:
    """One YAML document: its root (None if the text has none), and the repeated keys by line; the first one counts."""

    root: Node | None
    repeated: list[tuple[int, Problem]]


def where(file: str, line: int) -> str:
    return f"{file}:{line}" if line else "--set"


def shown(value: Plain) -> str:
    """A value as a message shows it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"`{value[:60]}`" if value else "empty"
    if isinstance(value, list):
        return "a list"
    return "empty" if value is None else "a section" if isinstance(value, dict) else f"`{value}`"


def parse(text: str, file: str, key: str = "") -> Document:
    """Reads a file's text, or the text that `--set` gives to `key`, whose line is 0; raises RecipeError if it is not YAML."""
    return _Parser(text.removeprefix("\ufeff"), file, key).document


def plain(node: Node, lines: dict[str, int], key: str = "") -> Plain:
    """The values without their lines, which go into `lines` under dotted keys like `data.train[0].path`."""
    lines[key] = node.line
    if isinstance(node.value, dict):
        return {name: plain(child, lines, f"{key}.{name}" if key else name) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child, lines, f"{key}[{index}]") for index, child in enumerate(node.value)]
    return node.value


def override(root: Node, setting: str) -> list[tuple[int, Problem]]:
    """Writes `a.b[0].c=value` into the nodes and gives the keys repeated in the value; `null` takes the key away."""
    key, equals, text = setting.partition("=")
    if not equals or not _OVERRIDE_KEY.fullmatch(key):
        raise RecipeError([Problem("--set", "", f"`{setting}` is not like `optimizer.learning_rate=1e-4`")])
    document = parse(text, "--set", key)
    if document.root is None:
        raise RecipeError([Problem("--set", key, "has no value", f"`--set {key}=null` takes the key away")])
    *parents, last = [int(index) if index else name for name, index in re.findall(r"([\w-]+)|\[(\d+)\]", key)]
    node = root
    for part in parents:
        node = _place(node, part, key, Node(0, {}))
    _place(node, last, key, document.root)
    _put(node, last, document.root)
    return document.repeated


def _put(node: Node, part: str | int, child: Node) -> None:
    """A child that holds nothing takes the key away."""
    holder = cast(dict[str | int, Node], node.value)  # or a list, whose parts are numbers: `_place` has looked
    if child.value is None:
        del holder[part]
    else:
        holder[part] = child


def _place(node: Node, part: str | int, key: str, default: Node) -> Node:
    """The child that `part` names; a key that is not there yet is added, a list item is not."""
    if isinstance(part, str) and node.value is None:
        node.value = {}
    if isinstance(part, str) and isinstance(node.value, dict):
        return node.value.setdefault(part, default)
    if isinstance(part, int) and isinstance(node.value, list) and part < len(node.value):
        return node.value[part]
    here = f"a list of {len(node.value)}" if isinstance(node.value, list) else shown(plain(node, {}))
    step = f"item [{part}]" if isinstance(part, int) else f"key `{part}`"
    raise RecipeError([Problem("--set", key, f"there is no {step}: what should hold it is {here}")])


class _Parser:
    def __init__(self, text: str, file: str, key: str):
        self.file = file
        self.key = key
        self.is_setting = key != ""
        self.repeated: list[tuple[int, Problem]] = []
        if len(text.encode(errors="replace")) > MAX_BYTES or text.count("[") + text.count("{") > MAX_BRACKETS:
            self.refuse(1, "is too large for a recipe", f"at most {MAX_BYTES:,} bytes and {MAX_BRACKETS:,} brackets")
        try:
            self.events = YAML(typ="safe", pure=True).parse(text)
            self.document = Document(self.read_document(), self.repeated)
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.refuse(line, f"is not YAML: {error.problem}")
        except YAMLError as error:  # a character that YAML forbids; ruamel.yaml gives its place as an offset
            position = getattr(error, "position", 0)
            self.refuse(text.count("\n", 0, position) + 1, "is not YAML: holds a control character")
        except (OverflowError, ValueError):  # ruamel.yaml gives an escape beyond Unicode, like "\UFFFFFFFF", to chr()
            self.refuse(1, "is not YAML: an escape names no character")

    def refuse(self, line: int, message: str, hint: str | None = None, key: str = "") -> NoReturn:
        raise RecipeError(
            [Problem("--set" if self.is_setting else where(self.file, line), key or self.key, message, hint)]
        )

    def line(self, event: NodeEvent) -> int:
        return 0 if self.is_setting else event.start_mark.line + 1

    def read_document(self) -> Node | None:
        root = None
        for event in self.events:
            if isinstance(event, NodeEvent) and root is not None:
                self.refuse(self.line(event), "is two documents", "keep one, and remove the `---` between them")
            if isinstance(event, NodeEvent):
                root = self.read(event, self.key, 0)
        return root

    def read(self, event: NodeEvent, key: str, depth: int) -> Node:
        line = self.line(event)
        quotes = "write the plain value, or put it in quotes if it is text"
        if isinstance(event, AliasEvent) or event.anchor:
            self.refuse(line, "anchors (`&`) and aliases (`*`) are not allowed", quotes, key)
        if getattr(event, "tag", None) is not None:
            self.refuse(line, "tags (`!`) are not allowed", quotes, key)
        if depth > MAX_DEPTH:
            self.refuse(line, f"is nested more than {MAX_DEPTH} levels deep")
        node = Node(line, None)
        if isinstance(event, ScalarEvent):
            node.value = _text(event) if event.style else _scalar(event.value)
        elif isinstance(event, MappingStartEvent):
            node.value = self.read_mapping(key, depth)
        else:
            node.value = []
            while not isinstance(event := next(self.events), CollectionEndEvent):
                node.value.append(self.read(event, f"{key}[{len(node.value)}]", depth + 1))
        return node

    def read_mapping(self, key: str, depth: int) -> dict[str, Node]:
        children: dict[str, Node] = {}
        while not isinstance(event := next(self.events), CollectionEndEvent):
            line = self.line(event)
            if not isinstance(event, ScalarEvent):
                self.refuse(line, "a key must be a word")
            name = _text(event)
            child_key = f"{key}.{name}" if key else name
            child = self.read(next(self.events), child_key, depth + 1)
            if name in children:
                first = f"; the first is on line {children[name].line}" if children[name].line else ""
                self.repeated.append(
                    (line, Problem(where(self.file, line), child_key, f"repeated key{first}", "keep one of them"))
                )
            else:
                children[name] = Node(line, child.value)
        return children


def _text(event: ScalarEvent) -> str:
    event.value.encode()  # an escape can be half a character, like "\\ud800": a ValueError here, not when it is printed
    return event.value


def _scalar(word: str) -> Scalar:
    if word in _NULLS:
        return None
    if word in _BOOLEANS:
        return _BOOLEANS[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if NUMBER.fullmatch(word) else word
