"""Answers of a model to questions, in batches: the same ones whatever comes together."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from finetune.compare.generation.answerer import Answerer
from finetune.compare.generation.sampling import Sampler, seed_of
from finetune.compare.generation.settings import Settings
from finetune.compare.generation.together import ALONE, LEVEL, left_padded, together
from finetune.compare.generation.watch import CONTEXT, Answer, Listener, Watch, text_of
from finetune.data import refusals
from finetune.errors import DataError, FinetuneError, counted, explained

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


class Question(NamedTuple):
    ids: Sequence[int]
    where: str
    """Its place, for messages."""


class Generated(NamedTuple):
    question: int
    """Its number among the questions."""
    sample: int
    text: str
    tokens: int
    """As many as the model wrote, the stop token with them."""
    is_stopped: bool
    """By a stop token or text. False where the answer reached the most tokens, or was broken off."""


class _Row(NamedTuple):
    question: int
    sample: int
    ids: Sequence[int]
    most: int
    """Tokens of its answer."""


def generated(
    answerer: Answerer,
    questions: Sequence[Question],
    settings: Settings,
    listen: Listener | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Generated]:
    """Every answer to every question, as batches are done: short questions come first. DataError at once with every question that
    leaves no room for an answer.

    `listen` gets each answer as it grows. All end, as they are, once `is_over`.
    """
    rows, bad = [], []
    for number, question in enumerate(questions):
        try:
            most = _most(answerer, question, settings)
        except DataError as error:
            bad.append(error)
        else:
            rows += [_Row(number, sample, question.ids, most) for sample in range(settings.samples)]
    if bad:
        raise refusals.together(bad, len(questions))
    batches = _batches(rows, _way(answerer, rows), settings)
    return (one for batch in batches for one in _written(answerer, batch, settings, listen, is_over))


def _most(answerer: Answerer, question: Question, settings: Settings) -> int:
    """The tokens of an answer: as many as asked for, or as the model has positions left."""
    count = len(question.ids)
    if not count:
        raise DataError("the prompt is empty", where=question.where, hint="give it some text")
    if answerer.positions is None:
        return settings.max_new_tokens
    if count >= answerer.positions:
        said = f"the prompt has {counted(count, 'token')}, and {answerer.ref} has {counted(answerer.positions, 'position')}"
        raise DataError(said, where=question.where, hint="shorten it, so that an answer fits behind it")
    return min(settings.max_new_tokens, answerer.positions - count)


def _way(answerer: Answerer, rows: Sequence[_Row]) -> str:
    if len(rows) < 2 or answerer.mixes_rows:
        return ALONE
    return together(answerer.base_directory)


def _batches(rows: Sequence[_Row], way: str, settings: Settings) -> Iterator[list[_Row]]:
    """Rows that come together. One with fewer positions left than the others want is with its like alone: theirs would go beyond."""

    def key(row: _Row) -> tuple[int, int]:
        is_short = row.most < settings.max_new_tokens
        return (len(row.ids) if way == LEVEL or is_short else 0), row.most

    size = 1 if way == ALONE else settings.batch_size
    for _, alike in groupby(sorted(rows, key=lambda row: (*key(row), len(row.ids))), key=key):
        found = list(alike)
        yield from (found[start : start + size] for start in range(0, len(found), size))


def _written(
    answerer: Answerer,
    batch: list[_Row],
    settings: Settings,
    listen: Listener | None,
    is_over: Callable[[], bool],
) -> Iterator[Generated]:
    answers = [Answer(row.question, row.sample, row.ids[-CONTEXT:]) for row in batch]
    watch = Watch(answerer, answers, settings, listen, is_over)
    _run(answerer, batch, settings, watch)
    if watch.failed:
        raise watch.failed
    for answer in answers:
        text = answer.text if listen or settings.stop else text_of(answerer.tokenizer, answer, answerer.stops)
        yield Generated(answer.question, answer.sample, text, len(answer.tokens), answer.is_stopped)


def _run(answerer: Answerer, batch: list[_Row], settings: Settings, watch: Watch) -> None:
    device = answerer.model.device
    filler = min(answerer.stops, default=0)  # the mask hides it
    sampler = LogitsProcessorList()
    if settings.temperature:
        seeds = [seed_of(settings, row.sample, row.ids) for row in batch]
        sampler.append(Sampler(settings, seeds, device))
    # `watch` ends rows at their stop tokens, so transformers is given none
    asked = GenerationConfig(max_new_tokens=batch[0].most, do_sample=False, use_cache=True, pad_token_id=filler)
    with torch.inference_mode(), explained("transformers cannot generate with it", answerer.ref):
        try:
            cast("GenerativePreTrainedModel", answerer.model).generate(
                **left_padded([[*row.ids] for row in batch], filler, device),
                generation_config=asked,
                logits_processor=sampler,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        except torch.OutOfMemoryError:
            said = f"{counted(len(batch), 'answer')} at once do not fit into the memory of the device"
            hint = "lower --batch-size or --max-new-tokens"
            raise FinetuneError(said, where=answerer.ref, hint=hint) from None
