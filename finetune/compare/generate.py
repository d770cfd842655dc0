"""Answers of several models to the same prompts: the quickest look at the effect of a training."""

import gc
from collections.abc import Callable, Sequence
from typing import TypedDict

from finetune.compare.generation.answerer import open_answerer
from finetune.compare.generation.answers import Generated, generated
from finetune.compare.generation.settings import Settings
from finetune.compare.prompts import Prompt, questions_of


class Answer(TypedDict):
    """A result of `generate --json`."""

    ref: str
    prompt: object
    """Text, or a list of messages or of tokens."""
    where: str
    """The place of the prompt."""
    sample: int
    """From 0."""
    text: str
    tokens: int
    """As many as the model wrote, the stop token with them."""
    is_stopped: bool
    """By a stop token. False where the answer was cut at the most tokens."""


def generate(
    refs: Sequence[str],
    prompts: Sequence[Prompt],
    settings: Settings,
    note: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """An answer for each prompt, ref and sample, in this order; a ref counts once. One model is in memory at a time; `note` is called after each answer."""
    found = {ref: _answers(ref, prompts, settings, note) for ref in dict.fromkeys(refs)}
    return [answer for number in range(len(prompts)) for ref in found for answer in found[ref][number]]


def _answers(ref: str, prompts: Sequence[Prompt], settings: Settings, note: Callable[[], None]) -> list[list[Answer]]:
    """The answers of a model to each prompt."""
    gc.collect()  # the model before this one: its modules and their hooks hold one another
    answerer = open_answerer(ref)
    answers: list[list[Generated]] = [[] for _ in prompts]
    for one in generated(answerer, questions_of(answerer, prompts), settings):
        answers[one.question].append(one)
        note()
    return [
        [_answer(ref, prompt, one, answerer.is_conversational) for one in sorted(of_prompt, key=lambda one: one.sample)]
        for prompt, of_prompt in zip(prompts, answers, strict=True)
    ]


def _answer(ref: str, prompt: Prompt, one: Generated, is_turn: bool) -> Answer:
    # what goes on with a text keeps its blanks
    text = one.text.strip() if is_turn else one.text
    return {
        "ref": ref,
        "prompt": prompt.shown,
        "where": prompt.where,
        "sample": one.sample,
        "text": text,
        "tokens": one.tokens,
        "is_stopped": one.is_stopped,
    }
