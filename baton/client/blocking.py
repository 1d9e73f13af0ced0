"""The client for threads. ``baton.client.aio`` is its twin for asyncio; what they decide is in modules they share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, Self, Unpack

import grpc
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


class Client:
    """One connection to a gRPC endpoint. Threads may share it. Use it with ``with``, or close it.

    Every method raises :class:`baton.errors.BatonError` when the call fails: its class says who must act, ``code`` is
    gRPC's, ``field`` the path of the argument at fault, ``retry_after_ms`` the server's advice.
    """

    def __init__(
        self, address: str, *,
        api_key: str = "", tls: Tls | None = None, retry: Retry | None = None, timeout_s: float = TIMEOUT_S,
        compress: bool = False, keepalive_s: float = KEEPALIVE_S, keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
    ) -> None:  # fmt: skip
        """``address``: host:port. ``compress``: gzip both ways. ``keepalive_s``: see ``baton.client.channel``."""
        self._connection = Connection(address, api_key, tls, compress, keepalive_s, keepalive_timeout_s)
        self._retry, self._timeout_s = retry or Retry(), seconds(timeout_s, TIMEOUT_S)
        self._channel = self._connection.open(grpc)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._how = {"metadata": self._connection.metadata(), "compression": self._connection.compression()}

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continues text as it stands, or token ids; returns the whole answer."""
        return self._whole(asking.completion(prompt, options), options)

    def chat(self, turns: Sequence[Turn], **options: Unpack[Options]) -> Answer:
        """Answers a conversation of (role, content), oldest first; returns the whole answer."""
        return self._whole(asking.conversation(turns, options), options)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Part]:
        """As :meth:`generate`, in parts as they are computed. Closing the iterator cancels the request."""
        request = asking.completion(prompt, options)
        return self._parts(request, Reader.of(request), options)

    def stream_chat(self, turns: Sequence[Turn], **options: Unpack[Options]) -> Generator[Part]:
        """As :meth:`chat`, in parts as they are computed. Closing the iterator cancels the request."""
        request = asking.conversation(turns, options)
        return self._parts(request, Reader.of(request), options)

    def tokenize(self, text: str | Sequence[Turn], *, model: str = "") -> list[int]:
        """The token ids that generating from a text or a conversation would compute."""
        return list(self._unary(self._stub.Tokenize, asking.to_tokenize(text, model)).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids, special tokens included."""
        text: str = self._unary(self._stub.Detokenize, asking.to_detokenize(token_ids, model)).text
        return text

    def models(self) -> list[Model]:
        """What is served; the first one answers requests that name none."""
        return list(map(answers.model, self._unary(self._stub.ListModels, pb.ListModelsRequest()).models))

    def status(self) -> pb.GetStatusResponse:
        """What workers and router hold now."""
        status: pb.GetStatusResponse = self._unary(self._stub.GetStatus, pb.GetStatusRequest())
        return status

    def health(self, service: str = "") -> bool:
        """Whether ``service`` (by default the whole server) could serve a request now."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        state = self._unary(stub.Check, health_pb2.HealthCheckRequest(service=service)).status
        return bool(state == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Cancels what runs."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _whole(self, request: pb.GenerateRequest, options: Options) -> Answer:
        reader = Reader.of(request)
        with closing(self._parts(request, reader, options)) as parts:
            return reader.answer(list(parts))

    def _parts(self, request: pb.GenerateRequest, reader: Reader, options: Options) -> Generator[Part]:
        attempts = self._attempts(seconds(options.get("timeout_s"), self._timeout_s))
        while True:
            left_s = attempts.begin(time.monotonic())
            request.budget_ms = budget_ms(left_s)
            call = self._stub.Generate(request, timeout=left_s, **self._how)
            try:
                for response in call:
                    yield reader.part(response)
                reader.end()
                return
            except grpc.RpcError as error:
                failed = explain(error)
            finally:
                call.cancel()
            self._wait(attempts, failed, delivered=reader.delivered)

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = self._attempts(min(self._timeout_s, QUERY_TIMEOUT_S))
        while True:
            try:
                return method(request, timeout=attempts.begin(time.monotonic()), **self._how)
            except grpc.RpcError as error:
                self._wait(attempts, explain(error), delivered=False)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._retry, time.monotonic() + timeout_s)

    @staticmethod
    def _wait(attempts: Attempts, error: BatonError, *, delivered: bool) -> None:
        time.sleep(attempts.pause_s(error, time.monotonic(), delivered=delivered, chance=random.random()))
