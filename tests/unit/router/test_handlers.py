"""The contract's methods on a real server: requests as bytes, the call's deadline, compression of what is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest

from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from router.handlers import add_inference_to_server, within_deadline

GZIP = (("baton-response-encoding", "gzip"),)


@dataclass
class Servicer:
    """Streams two compressible responses, then waits; notes what it got."""

    budgets_ms: list[int] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(self, body: bytes, context: Any) -> AsyncGenerator[pb.GenerateResponse]:  # noqa: N802
        del context
        try:
            self.budgets_ms.append(within_deadline(pb.GenerateRequest.FromString(body)).budget_ms)
            for _ in range(2):
                yield pb.GenerateResponse(text="x" * 10_000)
            await asyncio.sleep(10)
        finally:
            self.closed.set()

    async def Tokenize(self, body: bytes, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        del body, context
        return pb.TokenizeResponse(token_ids=[7] * 20_000)

    Detokenize = ListModels = GetStatus = Tokenize


class Counter:
    """A TCP relay that counts the bytes from the server."""

    def __init__(self, port: int) -> None:
        self._target, self.received = port, 0
        self.relays = set[asyncio.Task[None] | None]()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.relays.add(asyncio.current_task())
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer, count=True))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, count: bool = False) -> None:
        try:
            while data := await source.read(65536):
                self.received += len(data) if count else 0
                sink.write(data)
        finally:
            sink.close()


@dataclass
class Served:
    servicer: Servicer
    channel: grpc.aio.Channel
    stub: Any
    counter: Counter


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    servicer, server = Servicer(), grpc.aio.server()
    add_inference_to_server(servicer, server)
    counter = Counter(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    relay = await asyncio.start_server(counter.relay, "127.0.0.1", 0)
    port = relay.sockets[0].getsockname()[1]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(servicer, channel, inference_pb2_grpc.InferenceStub(channel), counter)
    relay.close()
    await server.stop(0)
    await asyncio.wait([task for task in counter.relays if task is not None], timeout=5)


async def two(stub: Any, request: pb.GenerateRequest, **how: Any) -> None:
    call = stub.Generate(request, **how)
    for _ in range(2):
        assert len((await call.read()).text) == 10_000
    call.cancel()


async def test_the_calls_deadline_bounds_the_budget(served: Served) -> None:
    await two(served.stub, pb.GenerateRequest(prompt="x"), timeout=5)
    await two(served.stub, pb.GenerateRequest(prompt="x", budget_ms=700), timeout=5)
    await two(served.stub, pb.GenerateRequest(prompt="x", budget_ms=70_000), timeout=5)
    await two(served.stub, pb.GenerateRequest(prompt="x", budget_ms=70_000))
    await two(served.stub, pb.GenerateRequest(prompt="x"))
    first, second, third, fourth, fifth = served.servicer.budgets_ms
    assert 4000 < first < 5500  # gRPC rounds a timeout up on its way
    assert 4000 < third < 5500
    assert (second, fourth, fifth) == (700, 70_000, 0)


async def test_a_cancelled_stream_closes_its_generator(served: Served) -> None:
    await two(served.stub, pb.GenerateRequest(prompt="x"))
    async with asyncio.timeout(2.0):
        await served.servicer.closed.wait()


async def test_responses_are_compressed_where_the_client_asks(served: Served) -> None:
    await two(served.stub, pb.GenerateRequest(prompt="x"))
    plain, served.counter.received = served.counter.received, 0
    assert plain > 20_000
    await two(served.stub, pb.GenerateRequest(prompt="x" * 5000), metadata=GZIP, compression=grpc.Compression.Gzip)
    assert served.counter.received < 1000
    served.counter.received = 0
    assert len((await served.stub.Tokenize(pb.TokenizeRequest(), metadata=GZIP)).token_ids) == 20_000
    assert served.counter.received < 1000


async def test_an_unknown_method_is_not_implemented(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await served.channel.unary_unary("/baton.v1.Inference/Nothing")(b"")
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
