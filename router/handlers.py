"""Registers the contract's methods on a gRPC server, and keeps what servers above it do not pass on.

Requests are left as bytes: the generated registration decodes them inside gRPC, which answers undecodable ones with
UNKNOWN. The service decodes them itself, so that they are INVALID_ARGUMENT like every other bad request.

Serve's context has neither the call's deadline nor a way to compress a stream, so both are seen to here, where gRPC's
own context is at hand.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import grpc

from baton.wire import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
ENCODING_KEY = "baton-response-encoding"  # what gRPC does not carry: that a client wants its responses compressed
_deadline_s: ContextVar[float] = ContextVar("deadline_s", default=math.inf)  # monotonic, of the call being served


def add_inference_to_server(servicer: object, server: grpc.Server) -> None:
    """``servicer`` has a method per RPC, which takes the request's bytes and returns or yields messages."""
    handlers = {}
    for method in SERVICE.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[f"/{SERVICE.full_name}/{method.name}"] = make(
            getattr(servicer, method.name), response_serializer=lambda message: message.SerializeToString()
        )
    server.add_generic_rpc_handlers((_Handlers(handlers),))


def within_deadline(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """``request`` with a budget that ends no later than the call that brings it; workers learn it so."""
    left_s = _deadline_s.get() - time.monotonic()
    if left_s < math.inf:
        left_ms = max(1, math.ceil(1e3 * left_s))
        request.budget_ms = min(request.budget_ms, left_ms) if request.HasField("budget_ms") else left_ms
    return request


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The methods by path. Serve puts its own into ``_method_handlers``, as gRPC calls them in its handlers."""

    def __init__(self, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._method_handlers = handlers

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        handler = self._method_handlers.get(details.method)
        if handler is None:
            return None
        if handler.response_streaming:
            return handler._replace(unary_stream=_streaming(handler.unary_stream))
        return handler._replace(unary_unary=_single(handler.unary_unary))


def _streaming(method: Callable[[bytes, Any], AsyncGenerator[Any]]) -> Callable[[bytes, Any], AsyncGenerator[Any]]:
    async def stream(request: bytes, context: Any) -> AsyncGenerator[Any]:
        _prepare(context)
        async with aclosing(method(request, context)) as responses:
            async for response in responses:
                yield response

    return stream


def _single(method: Callable[[bytes, Any], Awaitable[Any]]) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def answer(request: bytes, context: Any) -> Any:
        if _prepare(context):
            await context.send_initial_metadata(())  # of a single response gRPC compresses nothing without
        return await method(request, context)

    return answer


def _prepare(context: Any) -> bool:
    """Notes the deadline; True when the responses are to be compressed."""
    left_s = context.time_remaining()
    _deadline_s.set(math.inf if left_s is None else time.monotonic() + left_s)
    compress = (ENCODING_KEY, "gzip") in context.invocation_metadata()
    if compress:
        context.set_compression(grpc.Compression.Gzip)
    return compress
