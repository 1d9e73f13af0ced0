"""Health needs no key: it answers at once, and holds little however many ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router import health
from router.health import Health

KINDS = health_pb2.HealthCheckResponse
ASKED = health_pb2.HealthCheckRequest()


class Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """On a real server, as Serve calls it."""

    def __init__(self) -> None:
        self.ready = True
        self.health = Health(lambda: self.ready)

    async def Check(self, request: object, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return self.health.check("", context)

    async def Watch(self, request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # noqa: N802
        async for state in self.health.watch("", context):
            yield state


@pytest.fixture
async def served() -> AsyncIterator[tuple[Servicer, health_pb2_grpc.HealthStub]]:
    servicer, server = Servicer(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


async def test_a_watch_tells_every_change(served: tuple[Servicer, health_pb2_grpc.HealthStub]) -> None:
    servicer, stub = served
    watch = stub.Watch(ASKED, timeout=10)
    assert (await watch.read()).status == KINDS.SERVING
    servicer.ready = False
    assert (await watch.read()).status == KINDS.NOT_SERVING
    watch.cancel()


async def test_watches_are_few_and_leave_room_when_they_end(
    served: tuple[Servicer, health_pb2_grpc.HealthStub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MOST_WATCHES", 3)
    servicer, stub = served
    watches = [stub.Watch(ASKED, timeout=10) for _ in range(3)]
    for watch in watches:
        assert (await watch.read()).status == KINDS.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Watch(ASKED, timeout=10).read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Check(ASKED, timeout=10)).status == KINDS.SERVING
    watches.pop().cancel()
    async with asyncio.timeout(5):
        while servicer.health._watches == 3:
            await asyncio.sleep(0.01)
    again = stub.Watch(ASKED, timeout=10)
    assert (await again.read()).status == KINDS.SERVING
    for watch in (*watches, again):
        watch.cancel()


async def test_a_router_that_must_go_ends_its_watches(
    served: tuple[Servicer, health_pb2_grpc.HealthStub],
) -> None:
    servicer, stub = served
    servicer.health.listed(False)  # it starts: Serve does not name it yet
    watch = stub.Watch(ASKED, timeout=10)
    assert (await watch.read()).status == KINDS.SERVING
    servicer.health.listed(True)
    waits = asyncio.create_task(watch.read())
    assert not (await asyncio.wait({waits}, timeout=2 * health.POLL_S))[0]
    servicer.health.listed(False)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await asyncio.wait_for(waits, 2.0)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert servicer.health._watches == 0
    servicer.health.listed(True)  # an update of the deployment was all
    again = stub.Watch(ASKED, timeout=10)
    assert (await again.read()).status == KINDS.SERVING
    again.cancel()
