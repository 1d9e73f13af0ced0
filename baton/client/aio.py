"""The client for asyncio: as ``baton.client.blocking``, whose every method it has, with ``await`` and ``async for``."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Self, Unpack

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import answers, asking
from baton.client.answers import Answer, Model, Part, Reader
from baton.client.asking import Options, Prompt, Turn
from baton.client.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, QUERY_TIMEOUT_S, TIMEOUT_S, Connection, Tls
from baton.client.explain import explain
from baton.client.retry import Attempts, Retry, budget_ms, seconds
from baton.errors import BatonError
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc


class AsyncClient:
    """One connection to a gRPC endpoint, for the event loop it is made on. Use it with ``async with``, or close it.

    Errors are :class:`baton.client.Client`'s. Cancelling a task that waits here cancels its call on the server.
    """

    def __init__(
        self, address: str, *,
        api_key: str = "", tls: Tls | None = None, retry: Retry | None = None, timeout_s: float = TIMEOUT_S,
        compress: bool = False, keepalive_s: float = KEEPALIVE_S, keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
    ) -> None:  # fmt: skip
        """``address``: host:port. ``compress``: gzip both ways. ``keepalive_s``: see ``baton.client.channel``."""
        self._connection = Connection(address, api_key, tls, compress, keepalive_s, keepalive_timeout_s)
        self._retry, self._timeout_s = retry or Retry(), seconds(timeout_s, TIMEOUT_S)
        self._channel = self._connection.open(grpc.aio)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._how = {"metadata": self._connection.metadata(), "compression": self._connection.compression()}

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continues text as it stands, or token ids; returns the whole answer."""
        return await self._whole(asking.completion(prompt, options), options)

    async def chat(self, turns: Sequence[Turn], **options: Unpack[Options]) -> Answer:
        """Answers a conversation of (role, content), oldest first; returns the whole answer."""
        return await self._whole(asking.conversation(turns, options), options)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Part]:
        """As :meth:`generate`, in parts as they are computed. Closing the iterator cancels the request."""
        request = asking.completion(prompt, options)
        return self._parts(request, Reader.of(request), options)

    def stream_chat(self, turns: Sequence[Turn], **options: Unpack[Options]) -> AsyncGenerator[Part]:
        """As :meth:`chat`, in parts as they are computed. Closing the iterator cancels the request."""
        request = asking.conversation(turns, options)
        return self._parts(request, Reader.of(request), options)

    async def tokenize(self, text: str | Sequence[Turn], *, model: str = "") -> list[int]:
        """The token ids that generating from a text or a conversation would compute."""
        return list((await self._unary(self._stub.Tokenize, asking.to_tokenize(text, model))).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids, special tokens included."""
        answer = await self._unary(self._stub.Detokenize, asking.to_detokenize(token_ids, model))
        return str(answer.text)

    async def models(self) -> list[Model]:
        """What is served; the first one answers requests that name none."""
        return list(map(answers.model, (await self._unary(self._stub.ListModels, pb.ListModelsRequest())).models))

    async def status(self) -> pb.GetStatusResponse:
        """What workers and router hold now."""
        status: pb.GetStatusResponse = await self._unary(self._stub.GetStatus, pb.GetStatusRequest())
        return status

    async def health(self, service: str = "") -> bool:
        """Whether ``service`` (by default the whole server) could serve a request now."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        answer = await self._unary(stub.Check, health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Cancels what runs."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _whole(self, request: pb.GenerateRequest, options: Options) -> Answer:
        reader = Reader.of(request)
        async with aclosing(self._parts(request, reader, options)) as parts:
            return reader.answer([part async for part in parts])

    async def _parts(self, request: pb.GenerateRequest, reader: Reader, options: Options) -> AsyncGenerator[Part]:
        attempts = self._attempts(seconds(options.get("timeout_s"), self._timeout_s))
        while True:
            left_s = attempts.begin(time.monotonic())
            request.budget_ms = budget_ms(left_s)
            call = self._stub.Generate(request, timeout=left_s, **self._how)
            try:
                async for response in call:
                    yield reader.part(response)
                reader.end()
                return
            except grpc.aio.AioRpcError as error:
                failed = explain(error)
            finally:
                call.cancel()
            await self._wait(attempts, failed, delivered=reader.delivered)

    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = self._attempts(min(self._timeout_s, QUERY_TIMEOUT_S))
        while True:
            try:
                return await method(request, timeout=attempts.begin(time.monotonic()), **self._how)
            except grpc.aio.AioRpcError as error:
                await self._wait(attempts, explain(error), delivered=False)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._retry, time.monotonic() + timeout_s)

    @staticmethod
    async def _wait(attempts: Attempts, error: BatonError, *, delivered: bool) -> None:
        await asyncio.sleep(attempts.pause_s(error, time.monotonic(), delivered=delivered, chance=random.random()))
