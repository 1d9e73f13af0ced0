"""gRPC alone: made-up tokens from a bare ``grpc.aio`` server on uvloop, as Serve's replicas use it, and nothing else.

What a message costs here and how late it comes is the least that any router in Python can do with this gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import time
from collections.abc import AsyncGenerator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
import uvloop

from baton.wire import inference_pb2 as pb
from bench.due import token_due

HOST = "127.0.0.1"
START_S = 30.0


async def generate(request: pb.GenerateRequest, context: Any) -> AsyncGenerator[bytes]:
    """As ``bench.paced`` does it: the seed is the rate, a priority means that all streams' tokens come at once."""
    gap_s = 1e3 / request.sampling.seed
    now_s = time.monotonic()
    due_s = now_s if request.priority <= 0 else math.ceil(now_s / gap_s) * gap_s
    loop = asyncio.get_running_loop()
    for _ in range(request.sampling.max_tokens):
        due = loop.create_future()
        loop.call_later(max(0.0, due_s - time.monotonic()), _ring, due)
        await due
        came_s = min(due_s, time.monotonic())  # uvloop's timers may be a millisecond early
        yield pb.GenerateResponse(token_ids=[token_due(came_s)], text=" hello").SerializeToString()
        due_s += gap_s


def _ring(due: asyncio.Future[None]) -> None:
    if not due.done():  # its stream was given up
        due.set_result(None)


async def _serve(pipe: Connection) -> None:
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(generate, request_deserializer=pb.GenerateRequest.FromString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.v1.Inference", {"Generate": method}),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    pipe.send(f"{HOST}:{port}")
    await server.wait_for_termination()


def _main(pipe: Connection) -> None:
    uvloop.run(_serve(pipe))


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Address and process id of such a server in a process of its own, while open."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs,))
    process.start()
    try:
        if not ours.poll(START_S):
            raise TimeoutError("the bare server did not start")
        assert process.pid is not None
        yield ours.recv(), process.pid
    finally:
        process.kill()
        process.join()
