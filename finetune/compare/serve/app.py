"""The routes of the server, as an ASGI application of starlette."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finetune.compare import prompts
from finetune.compare.generation.answerer import Answerer
from finetune.compare.generation.answers import Generated, Question
from finetune.compare.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Kind,
    Refused,
    Request,
    explained,
    finish_of,
    index_of,
    refusal,
)
from finetune.compare.serve.work import Begun, Event, Job
from finetune.data.example import Row
from finetune.data.shapes import messages
from finetune.errors import DataError, FinetuneError

MOST_BYTES = 16 << 20  # of a request
LOOK_SECONDS = 0.2  # between two looks whether a client still waits
PLACE = "the request"

RequestT = TypeVar("RequestT", bound=Request)


class Server:
    """Answers the requests to some models."""

    def __init__(
        self,
        answerers: Mapping[str, Answerer],
        executor: Executor,
        most: int,
        is_over: Callable[[], bool],
    ):
        self._answerers, self._executor, self._most, self._is_over = answerers, executor, most, is_over

    def app(self, hosts: Sequence[str]) -> Starlette:
        """`hosts` are the names by which it may be asked: a page of another site, whose name leads here, may not."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
            exception_handlers={Refused: _refused, FinetuneError: _refused, HTTPException: _unknown},
        )

    async def _models(self, http: HttpRequest) -> Response:
        listed = [{"id": ref, "object": "model", "created": 0, "owned_by": "finetune"} for ref in self._answerers]
        return JSONResponse({"object": "list", "data": listed})

    async def _chat(self, http: HttpRequest) -> Response:
        request = await _read(http, ChatRequest)
        answerer = self._answerer(request)
        converse = answerer.converse
        if converse is None:
            raise Refused(f"{answerer.ref} has no chat template: ask /v1/completions")

        def questions() -> list[Question]:
            row: Row = {"messages": request.messages, **({"tools": request.tools} if request.tools else {})}
            if request.messages[-1].get("role") == "assistant":
                raise Refused(
                    "the last message is one of the assistant, and there is nothing to answer", param="messages"
                )
            prompt = prompts.of_conversation(messages.SHAPE.canonical(row, PLACE), PLACE)
            return [Question(converse(prompt.row, PLACE), PLACE)]

        return await self._answered(http, request, Kind("chat", request.model), questions)

    async def _complete(self, http: HttpRequest) -> Response:
        request = await _read(http, CompletionRequest)
        answerer = self._answerer(request)

        def questions() -> list[Question]:
            rows = [{"text": each} if isinstance(each, str) else {"input_ids": each} for each in request.prompts]
            return [Question(answerer.go_on(dict(row), PLACE), PLACE) for row in rows]

        return await self._answered(http, request, Kind("text", request.model), questions)

    def _answerer(self, request: Request) -> Answerer:
        if request.model not in self._answerers:
            named = ", ".join(self._answerers)
            raise Refused(f"there is no model `{request.model}` here: there is {named}", 404, "model")
        return self._answerers[request.model]

    async def _answered(
        self, http: HttpRequest, request: Request, kind: Kind, questions: Callable[[], Sequence[Question]]
    ) -> Response:
        settings = request.settings(self._most)
        job = Job(self._answerer(request), questions, settings, request.stream, self._is_over)
        future = self._executor.submit(job.run)
        watching = asyncio.create_task(_watch(http, job))
        try:
            first = await job.events.get()
            if not isinstance(first, Begun):
                await asyncio.wrap_future(future)  # raises what is wrong with the request
                raise Refused("the server is stopping", 503)
            if request.stream:
                has_usage = bool(request.stream_options and request.stream_options.include_usage)
                lines = _lines(job, future, kind, settings.samples, first.prompt_tokens if has_usage else None)
                return StreamingResponse(lines, media_type="text/event-stream")
            texts = [event async for event in _events(job) if isinstance(event, Generated)]
            await asyncio.wrap_future(future)
            return JSONResponse(kind.whole(texts, settings.samples, first.prompt_tokens))
        finally:
            watching.cancel()


async def _watch(http: HttpRequest, job: Job) -> None:
    """Ends the job of a client that went away."""
    while not await http.is_disconnected():
        await asyncio.sleep(LOOK_SECONDS)
    job.is_gone = True


async def _events(job: Job) -> AsyncIterator[Event]:
    while (event := await job.events.get()) is not None:
        yield event


async def _lines(
    job: Job, future: "Future[None]", kind: Kind, samples: int, prompt_tokens: int | None
) -> AsyncIterator[str]:
    """An answer as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    told: dict[int, str] = {}
    texts: list[Generated] = []
    try:
        async for event in _events(job):
            if isinstance(event, Begun):
                continue
            index = index_of(event, samples)
            new, is_first = event.text[len(told.get(index, "")) :], index not in told
            finish = finish_of(event) if isinstance(event, Generated) else None
            if isinstance(event, Generated):
                texts.append(event)
            if new or finish:
                told[index] = event.text
                yield _line(kind.piece(index, new, is_first, finish))
        await asyncio.wrap_future(future)
        if prompt_tokens is not None:
            yield _line(kind.last(texts, prompt_tokens))
        yield "data: [DONE]\n\n"
    except FinetuneError as error:
        yield _line(refusal(str(error), 500))
    finally:
        job.is_gone = True


def _line(facts: Mapping[str, object]) -> str:
    return f"data: {json.dumps(facts)}\n\n"


async def _read(http: HttpRequest, kind: type[RequestT]) -> RequestT:
    """The request, once it is one. Only of JSON by name: a page of another site may send any other without a question before."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("send JSON, with the header `Content-Type: application/json`", 415)
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refused(f"the request has more than {MOST_BYTES >> 20} MiB", 413)
    try:
        return kind.model_validate_json(bytes(body), strict=True)
    except ValidationError as error:
        raise explained(error) from None


async def _refused(http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, Refused):
        return JSONResponse(refusal(str(error), error.status, error.param), error.status)
    status = 400 if isinstance(error, DataError) else 500
    return JSONResponse(refusal(str(error), status), status)


async def _unknown(http: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    known = "/v1/models, /v1/chat/completions and /v1/completions"
    return JSONResponse(
        refusal(f"{http.method} {http.url.path} is not answered here: there is {known}", status), status
    )
