"""The worker's side of the token plane, spoken to over real sockets."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest

from baton.errors import Overloaded
from baton.frames import FrameStream
from baton.messages import HEARTBEAT_S, PLANE, Cancel, Failed, Hello, Load
from baton.plane import LOAD_CHANGED_S, PlaneServer, answer, broke, failure
from baton.tasks import Jobs

HOST = "127.0.0.1"
HELLO = Hello(role="decode", worker_id="d1", generation="g1", layout="0" * 16, dtype="float32")


def load(running: int) -> Load:
    return Load(0, 0, running, 0, 64, 0, 0, 1024, 0)


class Worker:
    """A handler that keeps what it is told."""

    def __init__(self) -> None:
        self.held = load(0)
        self.records: asyncio.Queue[tuple[FrameStream, object]] = asyncio.Queue()
        self.left: asyncio.Queue[FrameStream] = asyncio.Queue()

    def received(self, link: FrameStream, record: object) -> None:
        self.records.put_nowait((link, record))

    def gone(self, link: FrameStream) -> None:
        self.left.put_nowait(link)

    def load(self) -> Load:
        return self.held


@pytest.fixture
async def worker() -> AsyncIterator[tuple[Worker, PlaneServer]]:
    handler = Worker()
    server = PlaneServer(handler, HELLO, host=HOST)
    await server.start()
    yield handler, server
    await server.close()


async def connect(server: PlaneServer) -> FrameStream:
    return await FrameStream.connect(HOST, server.port, PLANE, timeout_s=5.0)


async def receive(link: FrameStream) -> object:
    return await asyncio.wait_for(link.receive(), 5.0)


async def test_the_worker_speaks_first_hello_then_load(worker: tuple[Worker, PlaneServer]) -> None:
    handler, server = worker
    handler.held = load(3)
    async with await connect(server) as link:
        assert await receive(link) == HELLO
        assert await receive(link) == load(3)


async def test_a_changed_load_is_pushed_to_every_router_before_the_heartbeat(
    worker: tuple[Worker, PlaneServer],
) -> None:
    handler, server = worker
    async with await connect(server) as first, await connect(server) as second:
        for link in (first, second):
            assert await receive(link) == HELLO
        handler.held = load(7)
        async with asyncio.timeout(HEARTBEAT_S + LOAD_CHANGED_S):
            for link in (first, second):
                while await receive(link) != load(7):
                    pass


async def test_an_unchanged_load_is_a_heartbeat(worker: tuple[Worker, PlaneServer]) -> None:
    _, server = worker
    loop = asyncio.get_running_loop()
    async with await connect(server) as link:
        assert await receive(link) == HELLO
        start_s = loop.time()
        for _ in range(4):  # the greeting's, perhaps the first push, then heartbeats
            assert await receive(link) == load(0)
        assert 1.5 * HEARTBEAT_S < loop.time() - start_s < 10 * HEARTBEAT_S


async def test_records_reach_the_handler_and_answers_come_back(worker: tuple[Worker, PlaneServer]) -> None:
    handler, server = worker
    async with await connect(server) as link:
        link.send(Cancel("r1"))
        origin, record = await asyncio.wait_for(handler.records.get(), 5.0)
        assert record == Cancel("r1")
        answer(origin, failure("r1", Overloaded("full", retry_after_ms=50)))
        while isinstance(got := await receive(link), Hello | Load):
            pass
        assert got == Failed("r1", "RESOURCE_EXHAUSTED", "full", "", 50)


async def test_a_router_that_leaves_is_gone_once_and_answers_to_it_are_dropped(
    worker: tuple[Worker, PlaneServer],
) -> None:
    handler, server = worker
    link = await connect(server)
    link.send(Cancel("r1"))
    origin, _ = await asyncio.wait_for(handler.records.get(), 5.0)
    link.abort()
    assert await asyncio.wait_for(handler.left.get(), 5.0) is origin
    answer(origin, Cancel("r1"))
    await asyncio.sleep(2 * LOAD_CHANGED_S)
    assert handler.left.empty()


async def test_hostile_bytes_cost_only_their_own_connection(worker: tuple[Worker, PlaneServer]) -> None:
    handler, server = worker
    async with await connect(server) as good:
        reader, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
        await asyncio.wait_for(reader.read(), 5.0)  # until the worker closes it
        writer.close()
        await asyncio.wait_for(handler.left.get(), 5.0)
        good.send(Cancel("r2"))
        _, record = await asyncio.wait_for(handler.records.get(), 5.0)
        assert record == Cancel("r2")
        assert handler.left.empty()


async def test_closing_ends_every_connection(worker: tuple[Worker, PlaneServer]) -> None:
    handler, server = worker
    async with await connect(server) as link:
        assert await receive(link) == HELLO
        await server.close()
        while await receive(link) is not None:
            pass
    assert handler.left.qsize() == 1


async def test_a_request_that_dies_of_a_bug_is_answered_at_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Worker):
        jobs = Jobs(broke)

        def received(self, link: FrameStream, record: object) -> None:
            assert isinstance(record, Cancel)
            self.jobs.start(link, record.request_id, self.die)

        async def die(self) -> None:
            {}["missing"]

    server = PlaneServer(Broken(), HELLO, host=HOST)
    await server.start()
    reader, writer = await asyncio.open_connection(HOST, server.port)
    link = FrameStream(reader, writer, PLANE)
    link.send(Cancel("r1"))
    async with asyncio.timeout(5.0):
        while not isinstance(record := await link.receive(), Failed):
            pass
    assert (record.request_id, record.code) == ("r1", "INTERNAL")
    assert "KeyError" in caplog.text
    link.abort()
    await server.close()
