"""One request at a time: a thread writes the answers, and the server hands them on piece by piece."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from finetune.compare.generation.answerer import Answerer
from finetune.compare.generation.answers import Generated, Question, generated
from finetune.compare.generation.settings import Settings


class Begun(NamedTuple):
    """The request is understood, and its questions fit the model."""

    prompt_tokens: int


class Piece(NamedTuple):
    question: int
    sample: int
    text: str


Event = Begun | Piece | Generated


class Job:
    """A request on its way. `is_gone` once nobody waits for it any more."""

    def __init__(
        self,
        answerer: Answerer,
        questions: Callable[[], Sequence[Question]],
        settings: Settings,
        is_streamed: bool,
        is_over: Callable[[], bool],
    ):
        self._answerer, self._questions, self._settings, self._is_over = answerer, questions, settings, is_over
        self._listener = self._hear if is_streamed else None
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        """None is the last of them."""
        self.is_gone = False

    def run(self) -> None:
        """In the thread of all models: a tokenizer is no more than one thread's at a time. What it raises is the future's."""
        try:
            if not self._ends():
                questions = self._questions()
                answers = generated(self._answerer, questions, self._settings, self._listener, self._ends)
                self._tell(Begun(sum(len(question.ids) for question in questions)))
                for one in answers:
                    self._tell(one)
        finally:
            self._tell(None)

    def _hear(self, question: int, sample: int, text: str) -> None:
        self._tell(Piece(question, sample, text))

    def _ends(self) -> bool:
        return self.is_gone or self._is_over()

    def _tell(self, event: Event | None) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)
