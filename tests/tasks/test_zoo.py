"""Rows of 13 kinds with templates that behave as today's do: each is encoded as inference would see it, or refused. See `tests/zoo`."""

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.data.example import Example
from tests.zoo import matrix, oracle
from tests.zoo.catalog import ZOO, Specimen
from tests.zoo.judge import judged
from tests.zoo.rows import MORE, ROWS


def test_the_zoo_has_at_least_40_templates_and_13_kinds_of_rows() -> None:
    assert len(ZOO) >= 40
    assert len({specimen.template for specimen in ZOO.values()}) >= 40
    assert len(ROWS) == 13


@pytest.mark.parametrize("kind", ROWS)
def test_a_template_takes_a_row_rightly_or_refuses_it(kind: str) -> None:
    """One kind of row for each template: a sample of the table that `scripts/templates` prints."""
    for name in [*ZOO][[*ROWS].index(kind) :: len(ROWS)]:
        verdict = judged(ZOO[name], ROWS[kind], matrix.encode)
        assert verdict.state == ("ok" if verdict.is_possible else "refused"), f"{name} x {kind}: {verdict.why}"
        assert verdict.is_named, f"{name} x {kind}: {verdict.why}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_template_takes_every_row_rightly_or_refuses_it(name: str) -> None:
    verdicts = {kind: verdict for _, kind, verdict in matrix.cells([name], [*ROWS, *MORE], drawn=range(5))}
    assert not {kind: verdict.why for kind, verdict in verdicts.items() if verdict.state == "WRONG"}
    refused = {kind: verdict for kind, verdict in verdicts.items() if verdict.state == "refused"}
    assert not {kind: verdict.why for kind, verdict in refused.items() if not verdict.is_named}
    assert not {kind: verdict.why for kind, verdict in refused.items() if verdict.is_possible}


ENCODED = json.loads((Path(__file__).parents[1] / "zoo" / "encoded.json").read_text())
"""Digests of all cells that rows of rule 2 had before a conversation could be several examples (98e34d3)."""


@pytest.mark.parametrize("kinds", [["two turns", "tool call"], pytest.param([*ROWS | MORE], marks=pytest.mark.slow)])
def test_what_was_taken_before_is_encoded_as_it_was(kinds: list[str]) -> None:
    for name, digests in ENCODED.items():
        for kind in digests.keys() & {*kinds}:
            if not ZOO[name].has_wrong_marks:  # they were not looked at
                assert matrix.digest(matrix.encode(ZOO[name], (ROWS | MORE)[kind])) == digests[kind], f"{name} x {kind}"


def _by_hand(specimen: Specimen, *parts: tuple[str, bool]) -> list[Example]:
    """One example of these texts, each learnt or not."""
    tokens, learnt = [], []
    for text, is_learnt in parts:
        ids = specimen.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        learnt += [is_learnt] * len(ids)
    return [Example(np.array(tokens, dtype=np.int32), np.array(learnt))]


QUESTION, ANSWER = "<|im_start|>user\nHow tall is Kibo?<|im_end|>\n", "Rather tall.<|im_end|>"
ASKED = f"{QUESTION}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (((ASKED, False), (ANSWER, True), ("\n", False)), None),
        (((ASKED, False), (ANSWER + "\n", True)), "learns '\\n' too"),
        (((ASKED, False), ("Rather tall.", True), ("<|im_end|>\n", False)), "does not learn '<|im_end|>'"),
        (((QUESTION, False), ("<|im_start|>assistant\n" + ANSWER, True)), "learns '<|im_start|>assistant\\n' too"),
        (((ASKED, False), (ANSWER, False)), "does not learn"),
        ((("<|endoftext|>" + ASKED, False), (ANSWER, True)), "its text is not what the template writes"),
        (((ASKED, False), ("<|im_end|>", True), ("\n", False)), "its text is not what the template writes"),
        (((ASKED, False), ("Rat", True), ("her tall.<|im_end|>", True)), "other tokens than the tokenizer gives"),
    ],
)
def test_the_judge_finds_what_is_learnt_wrongly(parts: tuple[tuple[str, bool], ...], why: str | None) -> None:
    verdict = judged(ZOO["chatml"], ROWS["one turn"], lambda specimen, row: _by_hand(specimen, *parts))
    assert verdict.state == ("ok" if why is None else "WRONG")
    assert why is None or why in verdict.why


def _as_a_whole(specimen: Specimen, row: dict) -> list[Example]:
    """What many do: the whole conversation as it is at the end, with a mask over each answer."""
    messages = [{name: value for name, value in each.items() if name != "weight"} for each in row["messages"]]
    whole = oracle.render(specimen, messages, row.get("tools"), has_prompt=False)
    found = specimen.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learnt = np.zeros(len(found["input_ids"]), dtype=bool)
    for message in messages:
        if message["role"] == "assistant" and message["content"]:
            first = whole.rfind(message["content"].split("</think>")[-1].strip())
            last = min(at for stop in specimen.stops if (at := whole.find(stop, first)) >= 0)
            learnt |= np.array([end > first and start <= last for start, end in found["offset_mapping"]])
    return [Example(np.array(found["input_ids"], dtype=np.int32), learnt)]


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("chatml", "two turns", None),
        ("qwen2.5", "two turns", None),
        ("qwen3", "two turns", "goes on otherwise"),
        ("qwen3", "reasoning, two turns", "goes on otherwise"),
        ("nemotron-3", "one turn", "another beginning than inference"),
        ("gemma-4", "one turn", "another beginning than inference"),
        ("qwen2.5", "reasoning", "taken, but loses messages[1].reasoning_content"),
        ("r1-distill", "one turn", "taken, but the prompt of messages[1] ends with '<think>\\n'"),
        ("chatml", "turns in a row", "learns 'A draft to skip.<|im_end|>' too"),
        ("prints-null", "tool call", "does not learn"),
        ("reminder", "two turns", "another beginning than inference"),
    ],
)
def test_the_judge_finds_what_one_text_for_all_turns_gets_wrong(name: str, kind: str, why: str | None) -> None:
    verdict = judged(ZOO[name], ROWS[kind], _as_a_whole)
    assert verdict.state == ("ok" if why is None else "WRONG"), verdict.why
    assert why is None or why in verdict.why


def test_the_judge_takes_an_exception_of_python_as_wrong() -> None:
    def fails(specimen: Specimen, row: dict) -> list[Example]:
        raise TypeError("can only concatenate str")

    verdict = judged(ZOO["deepseek-v3"], ROWS["tool call"], fails)
    assert (verdict.state, verdict.why) == ("WRONG", "traceback: TypeError: can only concatenate str")
