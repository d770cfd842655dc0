"""A conversation with a model: its history, rendered in each turn as rows are in training."""

import json
import os
from collections.abc import Callable
from dataclasses import replace

from finetune.compare.generation.answerer import Answerer
from finetune.compare.generation.answers import Question, generated
from finetune.compare.generation.settings import Settings
from finetune.compare.prompts import ANSWER
from finetune.data.conversation import Message
from finetune.errors import BaseError, FinetuneError
from finetune.plan.row_order import derive

PLACE = "the conversation"


class Chat:
    def __init__(self, answerer: Answerer, system: str | None, settings: Settings):
        if answerer.converse is None:
            hint = f"continue a text instead: `finetune generate {answerer.ref} --prompt TEXT`"
            raise BaseError("has no chat template", where=answerer.ref, hint=hint)
        self._answerer, self._converse, self._settings = answerer, answerer.converse, settings
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        self._asked = 0

    @property
    def messages(self) -> list[Message]:
        return [*self._opening, *self._turns]

    def answer(self, text: str, listen: Callable[[str], None]) -> None:
        """Asks, and gives `listen` the answer piece by piece. What a KeyboardInterrupt leaves of it is kept, and the exception raised.

        DataError for a question that the template or the model cannot take; it is then forgotten.
        """
        question = {"role": "user", "content": text}
        ids = self._converse({"prompt": [*self.messages, question], "completion": ANSWER}, PLACE)
        self._asked += 1
        # another seed each time: the same question, asked again after /undo, gets another sample
        settings = replace(self._settings, seed=derive(self._settings.seed, self._asked))
        said = ""

        def hear(_: int, __: int, so_far: str) -> None:
            nonlocal said
            piece, said = so_far[len(said) :], so_far
            if piece:
                listen(piece)

        try:
            for one in generated(self._answerer, [Question(ids, PLACE)], settings, hear):
                hear(0, 0, one.text)
        except KeyboardInterrupt:
            if said.strip():
                self._keep(question, said)
            raise
        self._keep(question, said)

    def _keep(self, question: Message, said: str) -> None:
        self._turns += [question, {"role": "assistant", "content": said.strip()}]

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._turns = []

    def undo(self) -> None:
        """Forgets the last question and its answer."""
        if not self._turns:
            raise FinetuneError("there is nothing to undo")
        self._turns = self._turns[:-2]

    def save(self, path: str) -> None:
        """Adds the conversation to a file of rows, as one of them."""
        if not self._turns:
            raise FinetuneError("there is nothing to save")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n"
        try:
            with open(path, "ab+") as file:
                if file.tell() and not _ends_a_line(path):
                    line = b"\n" + line
                file.write(line)
        except OSError as error:
            raise FinetuneError(f"cannot be written: {error.strerror}", where=path) from None


def _ends_a_line(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
