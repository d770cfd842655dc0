"""What a model must learn from a row, worked out slowly and without a line of `finetune`: by rendering each turn as inference would.

For each learnt turn, plain `apply_chat_template` gives the prompt that inference sends (the messages before, and the generation prompt)
and the conversation that ends with the turn. The rest of the second behind the first, up to the first token that stops generation, is
what must be learnt, and nothing else. Where no rendering can give that, a refusal is right.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from tests.zoo.catalog import Specimen

DAY = "2026-03-09"
Message = dict[str, Any]
CLOSED_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>\s*|\s*<\|channel>thought\s*<channel\|>\s*")
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
REASONING = ("reasoning_content", "thinking", "reasoning")


class Impossible(Exception):
    """Why a row cannot be learnt with a template, as inference would see it."""


class Turn(NamedTuple):
    """A learnt turn."""

    number: int
    prompt: str
    answers: list[str]
    """What may be learnt behind the prompt: up to the first stop token, or to a later one if the template writes nothing between them."""
    ending: str
    """All that the template writes behind the prompt."""


class Reading(NamedTuple):
    """One way to hand a row to a template, with what it renders then."""

    messages: list[Message]
    tools: list[Any] | None
    turns: list[Turn]
    whole: str


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row as messages and tools; messages of a prompt are not learnt."""
    if "messages" not in row:
        parts = [
            [{"role": role, "content": given}] if isinstance(given, str) else given
            for role, given in (("user", row["prompt"]), ("assistant", row["completion"]))
        ]
        row = {**row, "messages": [*({**message, "weight": 0} for message in parts[0]), *parts[1]]}
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return {"messages": [*system, *row["messages"]], "tools": row.get("tools", [])}


def readings(specimen: Specimen, row: dict[str, Any]) -> tuple[list[Reading], list[str]]:
    """All ways in which the row may be handed over that lose nothing, and why the other ways do not serve."""
    found, reasons = [], []
    for messages, tools in _spellings(row):
        try:
            reading = _reading(specimen, row, messages, tools)
        except Impossible as reason:
            reasons.append(str(reason))
            continue
        # judged as one example a turn, which has the most in it
        texts = [(turn.prompt + turn.answers[-1], turn) for turn in reading.turns]
        seen = [text for text, _ in texts] + [reading.whole]
        if lost := losses(row, seen, _segments(reading), once_written(specimen, row, reading)):
            reasons.append(f"loses {lost[0]}")
        else:
            found.append(reading)
    return found, list(dict.fromkeys(reasons))


def render(
    specimen: Specimen, messages: list[Message], tools: list[Any] | None, has_prompt: bool, **options: Any
) -> Any:
    """Plain transformers, on a day of its own."""
    with _today():
        try:
            return specimen.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=specimen.template,
                add_generation_prompt=has_prompt,
                **({"tokenize": False} | options),
                **specimen.variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise Impossible(f"the template raises {type(error).__name__}: {error}") from None


def learnt(row: dict[str, Any]) -> list[int]:
    """The turns to learn. The first message of all answers nothing, and plain transformers renders no prompt for it."""
    return [
        number
        for number, message in enumerate(row["messages"])
        if number and message["role"] == "assistant" and message.get("weight") != 0
    ]


def once_written(specimen: Specimen, row: dict[str, Any], reading: "Reading") -> dict[int, list[str]]:
    """Turns that are not learnt, as they were when they were the last. A thought that the template drops later the model is not given."""
    unlearnt = [
        number
        for number, message in enumerate(row["messages"])
        if message["role"] == "assistant" and message.get("weight") == 0
    ]
    return {
        number: [render(specimen, reading.messages[: number + 1], reading.tools, has_prompt=False)]
        for number in unlearnt
    }


def losses(
    row: dict[str, Any], texts: list[str], segments: dict[int, list[str]], once: dict[int, list[str]]
) -> list[str]:
    """Fields of the row of which a piece is in no text (nor in one of `once`); of a learnt turn, not in what is learnt there."""
    lost = []
    last = max(segments, default=-1)
    for number, message in enumerate(row["messages"]):
        if number > last and len(segments) == len(texts):
            break  # nothing is learnt behind it, and it is in an example only where one has the whole conversation
        where = segments.get(number, texts + once.get(number, []))
        for field, piece in _pieces(message):
            if not any(_is_in(piece, text) for text in where):
                lost.append(f"messages[{number}].{field}")
    for piece in _told_of(row["tools"]):
        if not any(_is_in(piece, text) for text in texts):
            lost.append("tools")
    everything = "".join(texts)
    calls = [call for message in row["messages"] for call in message.get("tool_calls", [])]
    if any(repr(_function(call["function"], is_text=False)["arguments"]) in everything for call in calls):
        lost.append("the form of arguments: they are Python")
    if '{\\"' in everything:
        lost.append("the form of arguments: JSON in JSON")
    if re.search(r"\bNone\b", everything):
        lost.append("null: it became a word")
    return lost


def _segments(reading: Reading) -> dict[int, list[str]]:
    return {turn.number: [turn.answers[-1]] for turn in reading.turns}


def _reading(specimen: Specimen, row: dict[str, Any], messages: list[Message], tools: list[Any] | None) -> Reading:
    turns = [_turn(specimen, messages, tools, number) for number in learnt(row)]
    return Reading(messages, tools, turns, render(specimen, messages, tools, has_prompt=False))


def _turn(specimen: Specimen, messages: list[Message], tools: list[Any] | None, number: int) -> Turn:
    prompt = render(specimen, messages[:number], tools, has_prompt=True)
    through = render(specimen, messages[: number + 1], tools, has_prompt=False)
    rest = _behind(specimen, prompt, through)
    if rest is None:  # what is before the turn is written in another way once the turn is there: look for its header
        bare = render(specimen, messages[:number], tools, has_prompt=False)
        header = prompt.removeprefix(bare) if prompt.startswith(bare) else ""
        at = through.rfind(header) if header else -1
        rest = through[at + len(header) :] if at >= 0 else None
    if rest is None:
        same = _common(specimen, prompt, through)
        raise Impossible(
            f"the prompt of messages[{number}] ends with {prompt[len(same) :]!r}, which the turn does not begin with"
        )
    ends = [match.end() for match in re.finditer(_any_of(specimen.stops), rest)]
    if not ends:
        stop = _next_token(specimen, messages, tools, number, through)
        return Turn(number, prompt, [rest + stop], rest + stop)
    last = ends[0]
    for end in ends:  # a second end token right behind the first is no harm
        last = end if not re.sub(_any_of(specimen.special), "", rest[last:end]).strip() else last
    return Turn(number, prompt, list(dict.fromkeys([rest[: ends[0]], rest[:last]])), rest)


def _behind(specimen: Specimen, prompt: str, through: str) -> str | None:
    """What follows the prompt in a text that begins with it, but for blanks or an empty thought at the end of the prompt."""
    same = _common(specimen, prompt, through)
    added, rest = prompt[len(same) :], through[len(same) :]
    if added.strip() and not CLOSED_THOUGHT.fullmatch(added):
        return None
    is_within = same.rfind("<think>") > same.rfind("</think>") or same.rstrip().endswith("<|channel>thought")
    return None if is_within and added.strip() else rest  # what the prompt closes, the turn goes on with


def _next_token(specimen: Specimen, messages: list[Message], tools: list[Any] | None, number: int, through: str) -> str:
    """The stop token that the next role's turn begins with, where the turn has none."""
    after = {"role": "tool", "content": "x", "name": "x", "tool_call_id": "callcallc"}
    question = {"role": "user", "content": "x"}
    followers = messages[number + 1 : number + 2] or [after if messages[number].get("tool_calls") else question]
    for turn in (messages[number], {"role": "assistant", "content": "x"}):
        before = [*messages[:number], turn]
        alone = render(specimen, before, tools, has_prompt=False)
        followed = render(specimen, [*before, *followers], tools, has_prompt=False)
        if followed.startswith(alone) and (stop := re.match(_any_of(specimen.stops), followed[len(alone) :])):
            return stop.group()
    raise Impossible(f"nothing ends messages[{number}]")


def _common(specimen: Specimen, one: str, other: str) -> str:
    """The common beginning, which ends between tokens of the tokenizer's added ones."""
    pieces = re.compile(f"{_any_of([*specimen.special, *specimen.plain])}|.", re.DOTALL)
    pairs = zip(pieces.finditer(one), pieces.finditer(other), strict=False)
    return "".join(a.group() for a, _ in itertools.takewhile(lambda pair: pair[0].group() == pair[1].group(), pairs))


def _any_of(tokens: list[str]) -> str:
    return "(?:" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")"


def _spellings(row: dict[str, Any]) -> Iterator[tuple[list[Message], list[Any] | None]]:
    """The row in each form in which a server might hand it over: null as it is, empty or absent; arguments as mapping or text; and so on."""
    calls = any(message.get("tool_calls") for message in row["messages"])
    nulls = any(message["content"] is None for message in row["messages"])
    thinks = any(name in message for message in row["messages"] for name in REASONING)
    for null, is_text, is_parts, thought in itertools.product(
        ("", None, "absent") if nulls else ("",),
        (False, True) if calls else (False,),
        (False, True),
        REASONING if thinks else ("",),
    ):
        messages = [_spelt(message, null, is_text, is_parts, thought) for message in row["messages"]]
        yield messages, row["tools"] or None


def _spelt(message: Message, null: str | None, is_text: bool, is_parts: bool, thought: str) -> Message:
    spelt = {name: value for name, value in message.items() if name not in (*REASONING, "weight", "content")}
    content = message["content"]
    if content is not None:
        spelt["content"] = [{"type": "text", "text": content}] if is_parts else content
    elif null != "absent":
        spelt["content"] = [] if null == "" and is_parts else null
    for name in REASONING:
        if name in message:
            spelt[thought] = message[name]
    if calls := message.get("tool_calls"):
        spelt["tool_calls"] = [{**call, "function": _function(call["function"], is_text)} for call in calls]
    return spelt


def _function(function: dict[str, Any], is_text: bool) -> dict[str, Any]:
    arguments = function["arguments"]
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**function, "arguments": json.dumps(given, ensure_ascii=False) if is_text else given}


def _pieces(message: Message) -> Iterator[tuple[str, str]]:
    for name in ("content", *REASONING):
        for text in THOUGHT.split(message.get(name) or ""):
            if text.strip():
                yield name, text.strip()
    if "name" in message and message["role"] != "tool":
        yield "name", message["name"]
    for number, call in enumerate(message.get("tool_calls", [])):
        function = _function(call["function"], is_text=False)
        yield from _strings({f"tool_calls[{number}].{name}": value for name, value in function.items()})


def _told_of(tools: list[Any]) -> Iterator[str]:
    for tool in tools:
        function = tool["function"]
        yield from (function["name"], function["description"])
        for name, schema in function["parameters"]["properties"].items():
            yield from (name, schema["description"])


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Keys and texts within."""
    if isinstance(value, dict):
        for name, item in value.items():
            if place:
                yield place, name
            yield from _strings(item, place or name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, place)
    elif isinstance(value, str):
        yield place, value


def _is_in(piece: str, text: str) -> bool:
    return any(
        "".join(form.split()) in "".join(text.split())
        for form in (piece, *(json.dumps(piece, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)))
    )


@contextlib.contextmanager
def _today() -> Iterator[None]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls.fromisoformat(DAY)

    real, chat_template_utils.datetime = chat_template_utils.datetime, Clock
    try:
        yield
    finally:
        chat_template_utils.datetime = real
