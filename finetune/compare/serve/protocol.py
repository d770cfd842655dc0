"""The requests of the OpenAI protocol that are answered, and what the answers look like as JSON.

Written down in https://platform.openai.com/docs/api-reference. A field that would change the answer, and is not known here, is
refused by name: an answer that ignores it would look right.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from finetune.compare.generation.answers import Generated
from finetune.compare.generation.settings import Settings
from finetune.compare.serve.work import Piece

MOST_CHOICES = 16
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer."""
NEUTRAL: tuple[object, ...] = (None, False, 0, {}, [], "", "auto", {"type": "text"})
"""Values of other fields that ask for nothing."""

Text = Annotated[str, StringConstraints(min_length=1)]
Json = dict[str, object]


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        self.status, self.param = status, param
        super().__init__(message)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None

    @model_validator(mode="after")
    def _asks_for_nothing_else(self) -> "Request":
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS and value not in NEUTRAL:
                raise ValueError(f"`{name}` is not supported")
        return self

    @property
    def most(self) -> int | None:
        return self.max_tokens

    def settings(self, most: int) -> Settings:
        """As the protocol has it: temperature 1, and another sample each time, unless the request says otherwise."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Settings(
            max_new_tokens=self.most or most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=uuid.uuid4().int if self.seed is None else self.seed,
            samples=self.n or 1,
            stop=tuple(stop),
        )


class ChatRequest(Request):
    messages: Annotated[list[Json], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Json] | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text, several, or one of tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [item for item in self.prompt if isinstance(item, str)]
        return [*texts] if texts else [[item for item in self.prompt if isinstance(item, int)]]


def explained(error: ValidationError) -> Refused:
    """The first problem of a request."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    field = str(first["loc"][0]) if first["loc"] else None
    return Refused(f"`{field}`: {said}" if field else said, param=field)


class Kind:
    """How the answers to one kind of request look."""

    def __init__(self, kind: Literal["chat", "text"], model: str):
        self._is_chat = kind == "chat"
        self._object = "chat.completion" if self._is_chat else "text_completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._head: Json = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Generated], samples: int, prompt_tokens: int) -> Json:
        """The one object of an answer that is not streamed."""
        choices: list[Json] = [
            {
                "index": index_of(one, samples),
                **({"message": {"role": "assistant", "content": one.text}} if self._is_chat else {"text": one.text}),
                "logprobs": None,
                "finish_reason": finish_of(one),
            }
            for one in sorted(texts, key=lambda one: index_of(one, samples))
        ]
        return {**self._head, "object": self._object, "choices": choices, "usage": usage(texts, prompt_tokens)}

    def piece(self, index: int, text: str, is_first: bool, finish: str | None) -> Json:
        """The next piece of a streamed answer. Clients join the deltas of all pieces, so the role comes once."""
        delta = {**({"role": "assistant"} if is_first else {}), "content": text}
        said: Json = {"delta": delta} if self._is_chat else {"text": text}
        choice: Json = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": self._chunk, "choices": [choice]}

    def last(self, texts: Sequence[Generated], prompt_tokens: int) -> Json:
        """What follows all pieces if the request asks for it."""
        return {**self._head, "object": self._chunk, "choices": [], "usage": usage(texts, prompt_tokens)}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"


def index_of(one: Generated | Piece, samples: int) -> int:
    """The number of an answer among all choices."""
    return one.question * samples + one.sample


def finish_of(one: Generated) -> str:
    return "stop" if one.is_stopped else "length"


def usage(texts: Sequence[Generated], prompt_tokens: int) -> Json:
    written = sum(one.tokens for one in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


def refusal(message: str, status: int, param: str | None = None) -> Mapping[str, object]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
