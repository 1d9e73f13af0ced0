"""Cache events from a worker's journal to a router's index: over real sockets, and where some are missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from baton.blocks import BLOCK_TOKENS, BlockJournal
from baton.frames import FrameStream
from baton.messages import CacheEvents, Hello, Load
from baton.plane import PlaneServer
from router.cache_watch import CacheWatch
from router.peers import Peer, Pools, WorkerAddress
from router.prefix_index import PrefixIndex


class Worker:
    def received(self, link: FrameStream, record: object) -> None:
        raise AssertionError(f"{record} is none of the worker's business")

    def gone(self, link: FrameStream) -> None:
        """Nothing is held for a router."""

    def load(self) -> Load:
        return Load(0, 0, 0, 0, 100, 0, 0, 1, 0)


@contextlib.asynccontextmanager
async def worker(journal: BlockJournal) -> AsyncIterator[tuple[PlaneServer, WorkerAddress]]:
    hello = Hello("prefill", "w", "g1", "layout", "float32")
    server = PlaneServer(Worker(), hello, host="127.0.0.1", journal=journal)
    await server.start()
    try:
        yield server, WorkerAddress("prefill", "w", "127.0.0.1", server.port, "g1")
    finally:
        await server.close()


async def until(condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_index_follows_a_worker_from_its_connection_to_its_end() -> None:
    journal = BlockJournal()
    journal.change((1, 2), held=True)
    pools = Pools(connect_s=2)

    def held() -> dict[str, int]:
        return pools.index.match((1, 2, 3), 0.0)

    async with worker(journal) as (server, address):
        pools.update("prefill", [address])
        await until(lambda: held() == {"g1": 2 * BLOCK_TOKENS})
        journal.change((3,), held=True)
        await until(lambda: held() == {"g1": 3 * BLOCK_TOKENS})
        journal.change((3, 2), held=False)
        await until(lambda: held() == {"g1": BLOCK_TOKENS})
        journal.clear()
        await until(lambda: held() == {"g1": 0})
        journal.change((1,), held=True)
        await until(lambda: held() == {"g1": BLOCK_TOKENS})
        await server.close()
        await until(lambda: held() == {})
        assert len(pools.index) == 0
    await pools.close()


async def test_a_router_that_does_not_ask_is_told_nothing() -> None:
    journal = BlockJournal()
    journal.change((1,), held=True)
    pools = Pools(connect_s=2, watch_caches=False)
    async with worker(journal) as (_, address):
        pools.update("prefill", [address])
        await until(lambda: bool(pools.of("prefill")))
        await asyncio.sleep(0.15)
        assert pools.index.match((1,), 0.0) == {}
    await pools.close()


def test_after_a_gap_everything_is_asked_for_and_nothing_is_believed_until_then() -> None:
    index, asked = PrefixIndex(), list[int]()
    watch = CacheWatch(index, "w", lambda: asked.append(1))
    watch.begin()
    watch.told(CacheEvents(4, False, (9,), ()))  # on its way before the answer
    assert (index.match((9,), 0.0), len(asked)) == ({}, 1)
    watch.told(CacheEvents(4, True, (1,), ()))
    watch.told(CacheEvents(5, False, (2,), ()))
    assert index.match((1, 2), 0.0) == {"w": 2 * BLOCK_TOKENS}
    watch.told(CacheEvents(7, False, (3,), ()))
    assert (index.match((1, 2), 0.0), len(asked)) == ({}, 2)
    watch.told(CacheEvents(8, False, (4,), ()))
    assert (index.match((4,), 0.0), len(asked)) == ({}, 2)
    watch.told(CacheEvents(8, True, (4,), ()))
    assert index.match((4,), 0.0) == {"w": BLOCK_TOKENS}
    watch.end()
    assert len(index) == 0


def test_who_begins_to_watch_between_two_pushes_hears_of_what_ends_before_the_next() -> None:
    journal, index = BlockJournal(), PrefixIndex()
    journal.change((1, 2), held=True)
    index.apply("w", journal.snapshot())
    journal.change((2,), held=False)  # nobody else was ever told of it
    events = journal.take()
    assert events is not None
    assert index.apply("w", events)
    assert index.match((1, 2), 0.0) == {"w": BLOCK_TOKENS}


# ---- bounds


def test_a_journal_that_nobody_reads_stays_small_and_starts_over() -> None:
    journal = BlockJournal(most=4)
    for block in range(100):
        journal.change((block,), held=True)
        journal.change((block,), held=block in (7, 8))
    journal.change((7,), held=False)
    events = journal.take()
    assert events is not None
    assert (events.reset, set(events.added), events.removed) == (True, {7, 8}, ())  # 7 ended in two pages
    assert journal.take() is None


def test_what_an_index_has_no_room_for_is_not_known_to_be_held() -> None:
    index = PrefixIndex(most=2)
    index.apply("w", CacheEvents(0, True, (1, 2, 3), ()))
    index.expect("w", (1, 2, 3, 4, 5, 6), 0.0)
    assert index.match((1, 2, 3, 4, 5), 0.0) == {"w": 4 * BLOCK_TOKENS}
    index.apply("w", CacheEvents(1, False, (3,), (1,)))
    assert index.match((2, 3), 0.0) == {"w": 2 * BLOCK_TOKENS}
    index.forget("w")
    assert len(index) == 0


@pytest.mark.parametrize("gone", ["a", "b"])
def test_bits_of_those_who_went_are_used_again(gone: str) -> None:
    index = PrefixIndex()
    for name in ("a", "b"):
        index.apply(name, CacheEvents(0, True, (1,), ()))
    index.forget(gone)
    index.apply("c", CacheEvents(0, True, (), ()))
    left = ({"a", "b"} - {gone}).pop()
    assert index.match((1,), 0.0) == {left: BLOCK_TOKENS, "c": 0}


async def test_a_worker_that_is_gone_before_it_could_be_asked_is_only_lost() -> None:
    async with worker(BlockJournal()) as (_, address):
        peer = await Peer.connect(address, timeout_s=2)
        peer.close()
        peer.watch_cache(PrefixIndex())
        async with asyncio.timeout(2):
            await peer.listen()
