"""What a streamed token costs the router's front: the HTTP front beside gRPC, without workers behind it.

    python -m bench.front --streams 64 --rate 30 --seconds 8

The server process streams made-up tokens at a fixed rate through the real front (``router.openai`` under uvicorn, or
gRPC with the contract's handlers); clients are another process. Reported: the server's CPU for each message, how many
of the messages wanted were delivered, and how late they were.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import uvicorn

from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from bench import report
from router.handlers import add_inference_to_server
from router.openai.app import build
from router.validate import Limits

HOST = "127.0.0.1"
LIMITS = Limits("model", 4096, 4 << 20, 600.0, "lossless", "exact")
START_S = 0.5  # before the first token, so that all streams are there


@dataclass(frozen=True)
class Load:
    streams: int
    rate: float
    seconds: float

    @property
    def tokens(self) -> int:
        return int(self.rate * self.seconds)


class Paced:
    """An inference service whose tokens are due at fixed times; each says when that was."""

    limits = LIMITS

    def __init__(self, load: Load) -> None:
        self._load = load
        self.pools = type("Pools", (), {"hello": None})()

    async def stream(self, request: pb.GenerateRequest, *, arrived_s: float) -> AsyncGenerator[pb.GenerateResponse]:
        for index in range(self._load.tokens):
            due_s = arrived_s + START_S + index / self._load.rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            yield pb.GenerateResponse(token_ids=[index], text=f"{due_s:.6f}")
        yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(), ledger=pb.StageLedger())

    async def Generate(self, body: bytes, context: Any) -> AsyncGenerator[pb.GenerateResponse]:  # noqa: N802
        request = pb.GenerateRequest.FromString(body)
        async with aclosing(self.stream(request, arrived_s=time.monotonic())) as responses:
            async for response in responses:
                yield response

    Tokenize = Detokenize = ListModels = GetStatus = Generate  # registered beside it, not called


def serve(front: str, load: Load, pipe: Connection) -> None:
    """The server process: sends its port, and its CPU seconds when asked."""
    asyncio.run(_serve_http(load, pipe) if front == "http" else _serve_grpc(load, pipe))


async def _serve_http(load: Load, pipe: Connection) -> None:
    app: Any = build(Paced(load))  # type: ignore[arg-type]  # the part of a service that generation needs
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=0, lifespan="off", log_level="warning"))
    listening = socket.create_server((HOST, 0))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await _measured(listening.getsockname()[1], pipe)
    server.should_exit = True
    await serving


async def _serve_grpc(load: Load, pipe: Connection) -> None:
    server = grpc.aio.server()
    add_inference_to_server(Paced(load), server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    await _measured(port, pipe)
    await server.stop(0)


async def _measured(port: int, pipe: Connection) -> None:
    pipe.send(port)
    before_s = time.process_time()
    await asyncio.to_thread(pipe.recv)
    pipe.send(time.process_time() - before_s)


async def _http_stream(port: int, late_s: list[float]) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            _note(json.loads(line[len(b"data: ") :])["choices"][0]["text"], late_s)
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()


async def _grpc_stream(port: int, late_s: list[float]) -> None:
    async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        async for part in inference_pb2_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(prompt="x")):
            _note(part.text, late_s)


def _note(due: str, late_s: list[float]) -> None:
    if due:
        late_s.append(time.monotonic() - float(due))


def measure(front: str, load: Load) -> dict[str, float]:
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(front, load, theirs))
    process.start()
    stream: Callable[..., Any] = _http_stream if front == "http" else _grpc_stream
    late_s: list[float] = []

    async def clients(port: int) -> None:
        async with asyncio.timeout(load.seconds * 4 + 30):
            await asyncio.gather(*(stream(port, late_s) for _ in range(load.streams)))

    asyncio.run(clients(pipe.recv()))
    pipe.send("done")
    cpu_s = pipe.recv()
    process.join(10)
    wanted = load.streams * load.tokens
    cuts = statistics.quantiles(late_s, n=100)
    return {
        "messages": len(late_s),
        "wanted": wanted,
        "cpu_ms_per_message": cpu_s / len(late_s) * 1e3,
        "late_p50_ms": cuts[49] * 1e3,
        "late_p99_ms": cuts[98] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens/s of one stream")
    parser.add_argument("--seconds", type=float, default=8.0)
    load = Load(**vars(parser.parse_args()))
    result = {front: measure(front, load) for front in ("grpc", "http")}
    for front, figures in result.items():
        print(front, {name: round(value, 3) for name, value in figures.items()})
    report.save("front", {"load": vars(load), **result})


if __name__ == "__main__":
    main()
