"""The token plane from both ends, over real sockets: a plane server with a scripted handler, and the router's peers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from baton.errors import Unavailable
from baton.frames import FrameStream
from baton.messages import Cancel, Decode, Failed, Hello, Load, Tokens
from baton.plane import PlaneServer
from baton.request import Sampling, TokenEvent, Work
from router.peers import Peer, Pools, WorkerAddress
from router.suspicion import SILENT_S

IDLE = Load(0, 0, 0, 0, 100, 0, 0, 1, 0)


class Scripted:
    """Notes what it receives and answers Decode with two tokens in one frame shared with a stranger's token."""

    def __init__(self) -> None:
        self.records: list[object] = []
        self.links: list[FrameStream] = []
        self.gone_links = 0
        self.held = IDLE

    def received(self, link: FrameStream, record: object) -> None:
        self.records.append(record)
        self.links.append(link)
        if isinstance(record, Decode):
            name = record.work.request_id
            link.send(Tokens((TokenEvent(name, 0, 7), TokenEvent("stranger", 0, 1), TokenEvent(name, 1, 8))))

    def gone(self, link: FrameStream) -> None:
        self.gone_links += 1

    def load(self) -> Load:
        return self.held


@contextlib.asynccontextmanager
async def serving(generation: str = "g1") -> AsyncIterator[tuple[Scripted, PlaneServer, WorkerAddress]]:
    handler = Scripted()
    server = PlaneServer(handler, Hello("decode", "w", generation, "layout", "float32"), host="127.0.0.1")
    await server.start()
    try:
        yield handler, server, WorkerAddress("decode", "w", "127.0.0.1", server.port, generation)
    finally:
        await server.close()


async def until(condition: object, timeout_s: float = 3.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def work(name: str = "r") -> Work:
    return Work(name, (1, 2, 3), Sampling(), 0, 10.0)


async def test_records_reach_their_request_only() -> None:
    async with serving() as (_, _, address):
        peer = await Peer.connect(address, timeout_s=2)
        listening = asyncio.create_task(peer.listen())
        got: list[object] = []
        with peer.attached("r", lambda _, record: got.append(record), 3, computes=True):
            peer.send(Decode(work()))
            await until(lambda: got)
        assert got == [Tokens((TokenEvent("r", 0, 7), TokenEvent("r", 1, 8)))]
        listening.cancel()


async def test_leaving_tells_the_worker_to_free_the_request() -> None:
    async with serving() as (handler, _, address):
        peer = await Peer.connect(address, timeout_s=2)
        with peer.attached("r", lambda *_: None, 3, computes=True):
            pass
        await until(lambda: Cancel("r") in handler.records)
        peer.close()


async def test_a_recycled_port_is_not_taken_for_the_old_worker() -> None:
    async with serving("new") as (_, _, address):
        with pytest.raises(Unavailable, match="generation"):
            await Peer.connect(replace(address, generation="old"), timeout_s=2)


async def test_the_end_of_the_connection_fails_every_stream_at_once() -> None:
    async with serving() as (handler, server, address):
        peer = await Peer.connect(address, timeout_s=2)
        listening = asyncio.create_task(peer.listen())
        got: list[object] = []
        with peer.attached("r", lambda _, record: got.append(record), 3, computes=True):
            await server.close()
            await until(lambda: got)
        assert isinstance(got[0], Failed)
        assert got[0].code == "UNAVAILABLE"
        await listening
        await until(lambda: handler.gone_links == 1)


async def test_a_lost_connection_is_noticed_within_50_ms() -> None:
    """The best of five, since the machine may be busy: waiting for a heartbeat would take each of them longer."""
    seconds: list[float] = []
    for _ in range(5):
        async with serving() as (_, server, address):
            peer = await Peer.connect(address, timeout_s=2)
            listening = asyncio.create_task(peer.listen())
            failed: list[float] = []
            with peer.attached("r", lambda *_, told=failed: told.append(time.monotonic()), 3, computes=True):
                (link,) = server._links
                lost_s = time.monotonic()
                link.abort()
                await until(lambda told=failed: told)
            seconds.append(failed[0] - lost_s)
            await listening
    assert min(seconds) < 0.05


async def test_what_was_dispatched_since_the_last_push_counts_until_the_next() -> None:
    async with serving() as (handler, _, address):
        peer = await Peer.connect(address, timeout_s=2)
        listening = asyncio.create_task(peer.listen())
        with peer.attached("r", lambda *_: None, 30, computes=True):
            assert peer.view().unseen_tokens == 30
            handler.held = replace(IDLE, running=1)
            await until(lambda: peer.load.running == 1)
            assert peer.view().unseen_tokens == 0
        listening.cancel()


async def test_pools_follow_the_directory() -> None:
    pools = Pools(connect_s=2)
    async with serving("g1") as (_, _, one), serving("g2") as (_, server, two):
        pools.update("decode", [one, two])
        await until(lambda: len(pools.of("decode")) == 2)
        pools.update("decode", [two])
        assert [peer.address.generation for peer in pools.of("decode")] == ["g2"]
        await server.close()
        await until(lambda: not pools.of("decode"))
        assert (two, None, True) in pools.known("decode")
    await pools.close()


async def test_a_delisted_worker_keeps_the_streams_it_has() -> None:
    pools = Pools(connect_s=2)
    async with serving() as (handler, _, address):
        pools.update("decode", [address])
        await until(lambda: pools.of("decode"))
        peer, got = pools.of("decode")[0], list[object]()
        with peer.attached("r", lambda _, record: got.append(record), 3, computes=True):
            pools.update("decode", [])
            peer.send(Decode(work()))
            await until(lambda: got)
        assert isinstance(got[0], Tokens)
        assert handler.gone_links == 0
    await pools.close()


async def test_a_worker_that_is_listed_again_keeps_its_one_connection() -> None:
    """Serve takes workers off the list for a moment while it updates their deployment."""
    pools = Pools(connect_s=2)
    async with serving() as (handler, server, address):
        pools.update("decode", [address])
        await until(lambda: pools.of("decode"))
        (peer,), got = pools.of("decode"), list[object]()
        with peer.attached("r", lambda _, record: got.append(record), 3, computes=True):
            pools.update("decode", [])
            pools.update("decode", [address])
            await asyncio.sleep(0.1)
            assert pools.of("decode") == [peer]
            assert len(server._links) == 1
            assert server._pusher is not None
            server._pusher.cancel()
            await until(lambda: got)
            assert isinstance(got[0], Failed), "its silence is noticed still"
            server._pusher = asyncio.create_task(server._push_load())
        await until(lambda: handler.links)  # it was told to cancel
        handler.links[0].abort()
        await until(lambda: pools.of("decode") and pools.of("decode")[0] is not peer)
        (keeper,) = pools._keepers.values()
        assert not keeper.done()
    await pools.close()
    assert keeper.cancelled()


async def test_a_worker_that_is_listed_again_before_it_answered() -> None:
    """The attempt of before is given up; its end does not take the new one with it."""
    silent: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        silent.append((reader, writer))

    pools = Pools(connect_s=2)
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as door:
        address = WorkerAddress("decode", "w", "127.0.0.1", door.sockets[0].getsockname()[1], "g1")
        pools.update("decode", [address])
        await until(lambda: silent)
        pools.update("decode", [])
        pools.update("decode", [address])
        await until(lambda: len(silent) == 2)
        assert [keeper.get_name() for keeper in pools._keepers.values() if not keeper.done()] == ["g1"]
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(silent[0][0].read(), 1.0)  # the first connection was closed
        await pools.close()
        for _, writer in silent:
            writer.close()


async def test_pools_reconnect_while_the_worker_is_listed() -> None:
    pools = Pools(connect_s=2)
    async with serving() as (handler, _, address):
        pools.update("decode", [address])
        await until(lambda: pools.of("decode"))
        pools.of("decode")[0].send(Decode(work()))
        await until(lambda: handler.links)
        handler.links[0].abort()
        await until(lambda: handler.gone_links == 1)
        await until(lambda: pools.of("decode"))
    await pools.close()


async def test_a_silent_worker_gives_up_its_streams_and_is_used_again_when_it_speaks() -> None:
    async with serving() as (handler, server, address):
        pools = Pools(connect_s=2.0)
        pools.update("decode", [address])
        await until(lambda: pools.of("decode"))
        (peer,) = pools.of("decode")
        failed: list[object] = []
        with peer.attached("r", lambda _, record: failed.append(record), 3, computes=True):
            assert server._pusher is not None
            server._pusher.cancel()  # as if the process were stopped
            begun_s = time.monotonic()
            await until(lambda: failed)
            assert time.monotonic() - begun_s < SILENT_S + 1.0
        assert isinstance(failed[0], Failed)
        assert (failed[0].code, failed[0].message) == ("UNAVAILABLE", "decode worker silent")
        assert pools.of("decode") == []
        assert pools.lost_s("decode") == 0, "new requests wait for it, as for a replacement"
        await until(lambda: Cancel("r") in handler.records)
        server._pusher = asyncio.create_task(server._push_load())
        await until(lambda: pools.of("decode") == [peer])
        await pools.close()


async def test_a_draining_worker_gets_nothing_new_and_keeps_its_streams() -> None:
    async with serving() as (_, server, address):
        pools = Pools(connect_s=2.0)
        pools.update("decode", [address])
        await until(lambda: pools.of("decode"))
        (peer,) = pools.of("decode")
        failed: list[object] = []
        with peer.attached("r", lambda _, record: failed.append(record), 3, computes=True):
            server.drain()
            await until(lambda: not pools.of("decode"))
            assert peer.draining
            assert not failed
        other = Pools(connect_s=2.0)
        other.update("decode", [address])
        await until(lambda: other.known("decode")[0][1] is not None)
        await until(lambda: other.known("decode")[0][1].draining)  # type: ignore[union-attr]
        await pools.close()
        await other.close()
