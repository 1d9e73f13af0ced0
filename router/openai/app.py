"""The HTTP application: routes, and for each what is read, asked of the service, and sent back.

A generation reads so: read the body, translate it, stream it from the service, assemble the answer. The status is not
sent before the first token is there, so that everything that fails before it is a plain HTTP error. A client that
leaves ends its handler, which closes the service's streams and so frees the request in every process.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.api_keys import ANYBODY, Caller
from baton.errors import BatonError
from baton.wire import inference_pb2 as pb
from router import metrics
from router.interleave import interleave
from router.openai import answers, document, errors, translate
from router.openai.assemble import Assembler, Chats, Completions, Form, Head
from router.openai.errors import HttpError
from router.openai.reading import read
from router.openai.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
)
from router.openai.translate import Job
from router.service import InferenceService
from router.siblings import OWN_PATH
from router.validate import REQUEST_ID, Limits

log = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"
EVENT_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
STALL_S = 60.0  # a client that reads nothing for so long is taken for gone
MALFORMED = "malformed"  # reason of bodies that are no request of the contract
INTERNAL_MESSAGE = "internal error; the router's log has the details"

Handler = Callable[..., Awaitable[ASGIApp]]  # of the request and its body, a model of ``requests`` or None
Admit = Callable[[Mapping[str, str]], Caller]  # of the headers; raises BatonError


def build(service: InferenceService) -> Starlette:
    """The application around ``service``, which runs on the same event loop."""
    front = Front(service)
    posts: list[tuple[str, Handler, type[Body] | None]] = [
        ("/v1/chat/completions", front.chat, ChatRequest),
        ("/v1/completions", front.completions, CompletionRequest),
        ("/v1/embeddings", front.embeddings, None),
        ("/tokenize", front.tokenize, TokenizeRequest),
        ("/detokenize", front.detokenize, DetokenizeRequest),
    ]
    gets: list[tuple[str, Handler]] = [
        ("/v1/models", front.models),
        ("/v1/models/{model:path}", front.model),
        ("/health", front.health),
        ("/metrics", front.metrics),
        (OWN_PATH, front.metrics),
        ("/openapi.json", front.openapi),
    ]
    limits, gate = service.limits, service.gate
    admits: dict[str, Admit] = {
        "/health": lambda _: ANYBODY, "/metrics": gate.admit_operator, OWN_PATH: gate.admit_operator
    }  # fmt: skip
    admits |= {path: service.admit for path, _, _ in posts}
    routes = [
        Route(path, Endpoint(handler, kind, limits, admits.get(path, gate.admit)), methods=[method])
        for method, path, handler, kind in (
            *(("POST", *post) for post in posts),
            *(("GET", *get, None) for get in gets),
        )
    ]

    def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HttpError) and not error.parsed:
            service.observer.meters.rejected(MALFORMED)
        return _refused(request, error)

    app = Starlette(
        routes=routes, exception_handlers={HTTPException: _no_such_route, HttpError: refused, Exception: _broken}
    )
    app.router.redirect_slashes = False
    return app


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a request reached this process (monotonic), whose it is, and its headers."""

    at_s: float
    caller: Caller
    headers: Mapping[str, str]


class Front:
    """One method per route. What they raise becomes an answer in :class:`Endpoint`."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self._started = int(time.time())

    # ---- generation

    async def chat(self, request: Request, body: ChatRequest) -> ASGIApp:
        arrival = Arrival(time.monotonic(), request.state.caller, request.headers)
        job = translate.chat(body, _request_id(request))
        head = self._head(job, choices=job.request.n)
        form = Chats(head, logprobs=bool(body.logprobs))
        return await self._generate([job], body, form, head, arrival)

    async def completions(self, request: Request, body: CompletionRequest) -> ASGIApp:
        arrival = Arrival(time.monotonic(), request.state.caller, request.headers)
        jobs = translate.completions(body, _request_id(request))
        n = jobs[0].request.n
        head = self._head(jobs[0], choices=len(jobs) * n)
        prompts = [await self._text(job, arrival.caller) if body.echo else "" for job in jobs]
        echoes = [prompt for prompt in prompts for _ in range(n)]
        form = Completions(head, logprobs=body.logprobs is not None, echoes=echoes)
        return await self._generate(jobs, body, form, head, arrival)

    async def embeddings(self, request: Request, body: None) -> ASGIApp:
        raise HttpError(
            400, "This server generates text; it serves no embeddings.", param="model", code="unsupported_endpoint"
        )

    async def _generate(self, jobs: list[Job], body: SamplingBody, form: Form, head: Head, arrival: Arrival) -> ASGIApp:
        usage_wanted = bool(body.stream_options and body.stream_options.include_usage)
        assembler = Assembler(form, head, n=jobs[0].request.n, usage_wanted=usage_wanted)
        parts = interleave([self._stream(job, arrival) for job in jobs])
        if body.stream:
            return await EventStream.begun(_chunks(parts, assembler))
        async with aclosing(parts):
            async for prompt, response in parts:
                assembler.collect(prompt, response)
        return _json(assembler.whole())

    async def _stream(self, job: Job, arrival: Arrival) -> AsyncGenerator[pb.GenerateResponse]:
        stream = self._service.stream(
            job.request, arrived_s=arrival.at_s, caller=arrival.caller, metadata=arrival.headers
        )
        try:
            async with aclosing(stream) as responses:
                async for response in responses:
                    yield response
        except BatonError as error:
            raise errors.of(error, job.renamed) from None
        except Exception:  # the process's outer boundary, as for gRPC: also a stream that has begun says why it ends
            log.exception("request failed")
            raise HttpError(500, INTERNAL_MESSAGE, kind=errors.SERVER, code="internal_error") from None

    async def _text(self, job: Job, caller: Caller) -> str:
        """The prompt as text; one of token ids is asked for as any client would, and counts as that does."""
        if job.request.WhichOneof("input") == "prompt":
            return job.request.prompt
        try:
            ids = pb.DetokenizeRequest(token_ids=job.request.token_ids.ids)
            answer = await self._service.detokenize(ids, caller)
        except BatonError as error:
            raise errors.of(error, {"token_ids": job.renamed["prompt"]}) from None
        return answer.text

    def _head(self, job: Job, *, choices: int) -> Head:
        hello = self._service.pools.hello
        fingerprint = f"fp_{hello.layout}" if hello else ""
        return Head(job.request.request_id, int(time.time()), self._service.limits.model, fingerprint, choices)

    # ---- the rest

    async def models(self, request: Request, body: None) -> ASGIApp:
        return _json(answers.ModelList(object="list", data=self._models()))

    async def model(self, request: Request, body: None) -> ASGIApp:
        wanted = request.path_params["model"]
        for model in self._models():
            if model.id == wanted:
                return _json(model)
        raise HttpError(404, f"The model {wanted[:64]!r} does not exist here.", param="model", code="model_not_found")

    def _models(self) -> list[answers.Model]:
        return [
            answers.Model(
                id=model.id,
                object="model",
                created=self._started,
                owned_by="baton",
                max_model_len=model.max_context_tokens,
            )
            for model in self._service.list_models().models
        ]

    async def tokenize(self, request: Request, body: TokenizeRequest) -> ASGIApp:
        try:
            answer = await self._service.tokenize(translate.tokenize(body), request.state.caller)
        except BatonError as error:
            raise errors.of(error, translate.CHAT_NAMES) from None
        ids = list(answer.token_ids)
        return _json(answers.Tokens(count=len(ids), max_model_len=answer.max_context_tokens, tokens=ids))

    async def detokenize(self, request: Request, body: DetokenizeRequest) -> ASGIApp:
        try:
            answer = await self._service.detokenize(translate.detokenize(body), request.state.caller)
        except BatonError as error:
            raise errors.of(error, translate.IDS_NAMES) from None
        return _json(answers.Text(prompt=answer.text))

    async def health(self, request: Request, body: None) -> ASGIApp:
        ready = self._service.ready
        return _json(answers.Health(ready=ready), status=200 if ready else 503)

    async def metrics(self, request: Request, body: None) -> ASGIApp:
        service = self._service
        meters = service.observer.meters
        text = metrics.text(service.report, meters, usable=service.usable(), unauthenticated=service.gate.refused)
        if request.url.path != OWN_PATH:
            text = await service.siblings.metrics(text, request.headers)
        return Response(text, media_type=metrics.CONTENT_TYPE)

    async def openapi(self, request: Request, body: None) -> ASGIApp:
        return Response(document.text(), media_type="application/json")


class EventStream:
    """Server-sent events as an ASGI response; an error after the first event is an event of its own, and the last."""

    def __init__(self, first: str, events: AsyncGenerator[str]) -> None:
        self._first, self._events = first, events

    @classmethod
    async def begun(cls, events: AsyncGenerator[str]) -> EventStream:
        """Returns with the first event there; raises what ``events`` raises until then."""
        return cls(await anext(events), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            await _emit(send, self._first)
            try:
                async for event in events:
                    await _emit(send, event)
            except HttpError as error:
                await _emit(send, f"data: {error.body}\n\n", more=False)
            else:
                await _emit(send, DONE, more=False)


class Endpoint:
    """A route as an ASGI application: asks who it is, reads the body if there is one, ends when the client leaves."""

    def __init__(self, handler: Handler, kind: type[Body] | None, limits: Limits, admit: Admit) -> None:
        self._handler, self._kind, self._limits, self._admit = handler, kind, limits, admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            request.state.caller = self._admit(request.headers)
            body = await self._body(request)
        except BatonError as error:
            raise errors.of(error, {}) from None
        except ClientDisconnect:
            return  # in the middle of its body: nothing was begun, and nobody is there to answer

        async def answer() -> None:
            response = await self._handler(request, body)
            await response(scope, receive, send)

        await while_connected(receive, answer())

    async def _body(self, request: Request) -> Body | None:
        if self._kind is None:
            return None
        limits = self._limits
        return await read(request, self._kind, max_bytes=limits.max_request_bytes, within_s=limits.body_s)


async def while_connected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Runs ``work``, and cancels it when the client leaves. ``receive`` has given the whole body before."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _emit(send: Send, event: str, *, more: bool = True) -> None:
    """Raises TimeoutError when the client has not read for so long that no buffer takes the event."""
    async with asyncio.timeout(STALL_S):
        await send({"type": "http.response.body", "body": event.encode(), "more_body": more})


async def _chunks(parts: AsyncGenerator[tuple[int, pb.GenerateResponse]], assembler: Assembler) -> AsyncGenerator[str]:
    async with aclosing(parts):
        async for prompt, response in parts:
            for chunk in assembler.chunks(prompt, response):
                yield f"data: {answers.text(chunk)}\n\n"


def _request_id(request: Request) -> str:
    """The client's, or Serve's, which gives one to every request without; one of our own where that is no id."""
    wanted = request.headers.get("x-request-id", "")
    return wanted if REQUEST_ID.fullmatch(wanted) else secrets.token_hex(8)


def _json(answer: answers.Answer, *, status: int = 200) -> Response:
    return Response(answers.text(answer), status_code=status, media_type="application/json")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return Response(error.body, error.status, headers=dict(error.headers), media_type="application/json")


def _no_such_route(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        refusal = HttpError(405, f"Not allowed to {request.method} on {request.url.path}.", code="method_not_allowed")
        refusal.headers = error.headers or {}
    else:
        refusal = HttpError(
            error.status_code, f"Invalid URL ({request.method} {request.url.path}).", code="unknown_url"
        )
    return _refused(request, refusal)


def _broken(request: Request, error: Exception) -> Response:
    """A defect; Starlette raises it again, to the server's log."""
    return _refused(request, HttpError(500, INTERNAL_MESSAGE, kind=errors.SERVER, code="internal_error"))
