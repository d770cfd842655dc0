"""Judges what an encoder makes of a row with a template: right, refused, or wrong, and why."""

import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np

from finetune.errors import FinetuneError
from tests.zoo import oracle
from tests.zoo.catalog import Specimen

NAMED = re.compile(r"`?(messages|prompt|completion|tools)\[\d+\]|`(tools|system)\b")
"""How a refusal names a turn or a field."""


class Encoded(Protocol):
    tokens: np.ndarray
    supervised: np.ndarray


Encode = Callable[[Specimen, dict[str, Any]], Sequence[Encoded]]


class Verdict(NamedTuple):
    state: str
    """`ok`, `refused` or `WRONG`."""
    why: str
    is_possible: bool = True
    """Whether the oracle knows what the model could learn from the row with the template."""
    is_named: bool = True
    """Whether a refusal names turn and field."""


def judged(specimen: Specimen, row: dict[str, Any], encode: Encode) -> Verdict:
    given, row = row, oracle.plain(row)
    possible, reasons = oracle.readings(specimen, row)
    try:
        examples = encode(specimen, given)
    except FinetuneError as error:
        message = " ".join(str(error).split())
        is_possible = bool(possible) and not specimen.has_wrong_marks
        return Verdict("refused", message, is_possible, bool(NAMED.search(message)))
    except Exception as error:  # noqa: BLE001 - any other exception is what is looked for
        return Verdict("WRONG", f"traceback: {type(error).__name__}: {error}", bool(possible))
    found = [faults(specimen, row, reading, examples) for reading in possible]
    if not found:
        return Verdict("WRONG", f"taken, but {reasons[0]}", is_possible=False)
    least = min(found, key=len)
    return Verdict("WRONG", "; ".join(least)) if least else Verdict("ok", f"{len(examples)} examples")


def faults(specimen: Specimen, row: dict[str, Any], reading: oracle.Reading, examples: Sequence[Encoded]) -> list[str]:
    """What is wrong with the examples if the row is to be read in this way."""
    forms = []
    if len(examples) == len(reading.turns):
        forms.append([(example, [turn]) for example, turn in zip(examples, reading.turns, strict=True)])
    if len(examples) == 1:
        forms.append([(examples[0], reading.turns)])
    if not forms:
        return [f"{len(examples)} examples of {len(reading.turns)} learnt turns"]
    wrong = [_of_form(specimen, row, reading, form) for form in forms]
    least = min(wrong, key=len)
    is_one_text = all(reading.whole.startswith(turn.prompt + turn.ending) for turn in reading.turns)
    if is_one_text and len(examples) > 1:
        least = [*least, "several examples, though one holds all turns as inference sees them"]
    return least


def _of_form(
    specimen: Specimen, row: dict[str, Any], reading: oracle.Reading, form: list[tuple[Encoded, list[oracle.Turn]]]
) -> list[str]:
    wrong, texts, segments = [], [], {}
    for example, turns in form:
        text = specimen.tokenizer.decode(example.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts.append(text)
        is_alone = len(turns) == 1 and turns[0].prompt + turns[0].ending
        full = is_alone if is_alone and is_alone.startswith(text) else reading.whole
        if not full.startswith(text) and text != turns[-1].prompt + turns[-1].answers[0]:
            wrong.append(f"its text is not what the template writes: {_difference(text, full)}")
            continue
        wrong += _of_turns(specimen, example, text, turns)
        if specimen.has_marks and not wrong:
            wrong += _of_marks(specimen, reading, example, turns, has_all=_learns_all(row))
        segments |= {turn.number: [turn.answers[-1]] for turn in turns}
    once = oracle.once_written(specimen, row, reading)
    return wrong + [f"no example has {each}" for each in oracle.losses(row, texts, segments, once)]


def _learns_all(row: dict[str, Any]) -> bool:
    return len(oracle.learnt(row)) == sum(message["role"] == "assistant" for message in row["messages"])


def _of_turns(specimen: Specimen, example: Encoded, text: str, turns: list[oracle.Turn]) -> list[str]:
    wrong = []
    for turn in turns:
        if not text.startswith(turn.prompt):
            wrong.append(
                f"messages[{turn.number}] has another beginning than inference: {_difference(text, turn.prompt)}"
            )
        elif not text.startswith(turn.prompt + turn.answers[0]):
            behind = text[len(turn.prompt) :]
            wrong.append(f"messages[{turn.number}] goes on otherwise: {_difference(behind, turn.answers[0])}")
    if wrong:
        return wrong
    tokens, offsets = _tokens(specimen, text, turns, list(example.tokens))
    if tokens != list(example.tokens):
        return ["other tokens than the tokenizer gives for its text"]
    masks = []
    for answers in product(*([each for each in turn.answers if text.startswith(turn.prompt + each)] for turn in turns)):
        spans = [(len(turn.prompt), len(turn.prompt + answer)) for turn, answer in zip(turns, answers, strict=True)]
        mask = [any(end > first and start < last for first, last in spans) for start, end in offsets]
        if mask == list(example.supervised):
            return []
        masks.append(mask)
    return [_mask_fault(text, offsets, masks[0], example)]


def _tokens(
    specimen: Specimen, text: str, turns: list[oracle.Turn], found: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and offsets of the text as a whole; or, if that is what was found, of the prompt and of what follows it."""
    whole = specimen.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if len(turns) > 1 or whole["input_ids"] == found:
        return whole["input_ids"], whole["offset_mapping"]
    cut = len(turns[0].prompt)
    one, two = (
        specimen.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        for part in (text[:cut], text[cut:])
    )
    moved = [(start + cut, end + cut) for start, end in two["offset_mapping"]]
    return one["input_ids"] + two["input_ids"], one["offset_mapping"] + moved


def _mask_fault(text: str, offsets: list[tuple[int, int]], right: list[bool], example: Encoded) -> str:
    more, less = (
        "".join(text[start:end] for (start, end), a, b in zip(offsets, *pair, strict=True) if a and not b)
        for pair in ((example.supervised, right), (right, example.supervised))
    )
    return ", ".join(
        said for said in (more and f"learns {_cut(more)} too", less and f"does not learn {_cut(less)}") if said
    )


def _of_marks(
    specimen: Specimen, reading: oracle.Reading, example: Encoded, turns: list[oracle.Turn], has_all: bool
) -> list[str]:
    """Where the template marks what is generated, plain transformers' mask of it has to be the same, but for blanks."""
    messages, tools = reading.messages, reading.tools
    is_whole = len(turns) == len(reading.turns)
    shown = messages if is_whole else messages[: turns[-1].number + 1]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    marked = oracle.render(specimen, shown, tools, has_prompt=False, **options)
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    first = 0 if is_whole else len(turns[0].prompt)
    # A template may mark the header too, which nobody learns: it is in the prompt.
    headers = [
        range(len(oracle.render(specimen, messages[: turn.number], tools, has_prompt=False)), len(turn.prompt))
        for turn in turns
    ]
    text = specimen.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    offsets = specimen.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    size = min(len(ids), len(example.tokens))
    if ids[:size] != list(example.tokens[:size]):
        return []  # an empty thought of the prompt, which the template does not write for the turn: nothing to compare with
    other = [
        (bool(is_marked), text[start:end])
        for (start, end), is_marked, is_learnt in zip(offsets, mask, example.supervised, strict=False)
        if bool(is_marked) != bool(is_learnt) and start >= first and not any(start in header for header in headers)
    ]
    more = "".join(token for is_marked, token in other if is_marked and (has_all or not is_whole))
    less = "".join(token for is_marked, token in other if not is_marked)
    return [f"the marks have {_cut(more)} more and {_cut(less)} less"] if (more + less).strip() else []


def _difference(found: str, right: str) -> str:
    same = next((n for n, (a, b) in enumerate(zip(found, right, strict=False)) if a != b), min(len(found), len(right)))
    return f"{_cut(found[same:])} for {_cut(right[same:])}"


def _cut(text: str) -> str:
    return repr(text[:60])
