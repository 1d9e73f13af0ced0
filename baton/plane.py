"""The worker's side of the token plane: accept routers, say Hello, hand their records to the worker, push its load."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from baton.blocks import BlockJournal
from baton.cache_feed import CacheFeed
from baton.errors import BatonError, Internal, ProtocolError, Unavailable
from baton.frames import FrameStream
from baton.guard import Guard
from baton.messages import HEARTBEAT_S, PLANE, Draining, Failed, Hello, Load, WatchCache

log = logging.getLogger(__name__)

LOAD_CHANGED_S = 0.05  # how soon a changed load is pushed; an unchanged one goes out as a heartbeat


class PlaneHandler(Protocol):
    """What a worker does with its routers. All methods run on the event loop and return at once."""

    def received(self, link: FrameStream, record: object) -> None:
        """One record came from ``link``."""

    def gone(self, link: FrameStream) -> None:
        """The router behind ``link`` is gone: free everything held for it."""

    def load(self) -> Load:
        """What the worker holds now."""


class PlaneServer:
    """Listens for routers on ``host``; ``port`` is known after :meth:`start`."""

    def __init__(
        self,
        handler: PlaneHandler,
        hello: Hello,
        *,
        host: str,
        guard: Guard | None = None,
        journal: BlockJournal | None = None,
    ) -> None:
        """``guard``: who may connect; None lets everybody in. ``journal``: of the prefix cache; None has no such."""
        self._handler, self._hello, self._host = handler, hello, host
        self._guard = guard or Guard()
        self._feed = CacheFeed(journal or BlockJournal())
        self._links: set[FrameStream] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._pushed: Load | None = None
        self._draining = False
        self._server: asyncio.Server | None = None
        self._pusher: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._pusher = asyncio.create_task(self._push_load(), name="load")

    async def close(self) -> None:
        if self._pusher is not None:
            self._pusher.cancel()
        if self._server is not None:
            self._server.close()
        self._guard.close()
        for link in self._links:
            link.abort()
        if self._connections:
            await asyncio.wait(self._connections, timeout=1.0)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Tells every router, and those to come, that nothing new is taken here any more."""
        self._draining = True
        for link in self._links:
            answer(link, Draining())

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = await self._guard.accept(reader, writer, PLANE)
        if link is not None:
            await self._converse(link)

    async def _converse(self, link: FrameStream) -> None:
        self._links.add(link)
        log.info("router %s connected", link.peer)
        try:
            link.send(self._hello)
            link.send(self._handler.load())
            if self._draining:
                link.send(Draining())
            while (record := await link.receive()) is not None:
                if isinstance(record, WatchCache):
                    self._feed.watch(link)
                else:
                    self._handler.received(link, record)
        except (ProtocolError, Unavailable) as error:
            log.warning("router %s: %s; connection closed", link.peer, error)
        finally:
            self._links.discard(link)
            link.abort()
            self._feed.gone(link)
            self._handler.gone(link)
            log.info("router %s disconnected", link.peer)

    async def _push_load(self) -> None:
        last_push_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOAD_CHANGED_S)
            self._feed.push()
            load = self._handler.load()
            if load == self._pushed and loop.time() - last_push_s < HEARTBEAT_S:
                continue
            self._pushed, last_push_s = load, loop.time()
            for link in list(self._links):
                try:
                    link.send(load)
                except Unavailable:
                    link.abort()


def answer(link: FrameStream, record: object) -> None:
    """Sends ``record`` if its router is still there; a router that is gone frees its requests by :meth:`gone`."""
    try:
        link.send(record)
    except Unavailable as error:
        log.info("%s not delivered: %s", type(record).__name__, error)


def failure(request_id: str, error: BatonError) -> Failed:
    """``error`` as the record that tells a router about it."""
    return Failed(request_id, error.code, error.message, error.field, error.retry_after_ms, error.reason)


def broke(link: FrameStream, request_id: str) -> None:
    """Tells a router that its request died of a bug here, so that nobody waits for its deadline."""
    answer(link, failure(request_id, Internal("internal error; the worker's log has the details")))
