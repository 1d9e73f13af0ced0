"""The router's side of the token plane: one connection per worker, found by the directory, lost without notice.

A :class:`Peer` is connected or it is nothing: every stream attached to it learns at once when the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from baton.errors import ProtocolError, Unavailable
from baton.frames import FrameStream
from baton.messages import (
    PLANE,
    CacheEvents,
    Cancel,
    Draining,
    Failed,
    Granted,
    Handed,
    Hello,
    Load,
    Report,
    Tokens,
    WatchCache,
)
from baton.request import TokenEvent
from baton.secure import ClusterKey
from engine.speed import PromptSpeed
from router.cache_watch import CacheWatch
from router.policy import WorkerView
from router.prefix_index import PrefixIndex
from router.suspicion import Suspicion

log = logging.getLogger(__name__)

Role = Literal["prefill", "decode"]
CHECK_S = 0.1  # between two looks for workers that fell silent
RECONNECT_S = (0.1, 0.2, 0.5, 1.0, 2.0)  # pauses between attempts while the directory still lists the worker


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker listens, and the generation that must answer there: ports are recycled, generations are not."""

    role: Role
    worker_id: str
    host: str
    port: int
    generation: str


Sink = Callable[["Peer", object], None]


class Peer:
    """One connected worker: sends records to it, and gives each record that comes back to its request's sink."""

    def __init__(self, address: WorkerAddress, link: FrameStream, hello: Hello, load: Load) -> None:
        self.address, self.hello, self._link, self._load = address, hello, link, load
        self._load_s = time.monotonic()
        self.suspicion = Suspicion(self._load_s)
        self.draining = False  # it said that it will leave
        self._sinks: dict[str, Sink] = {}
        self._unseen: dict[str, tuple[int, int]] = {}  # prompt tokens, and how many are computed there
        self.handoffs = PromptSpeed()  # what streams waited for handoffs to it
        self._cache: CacheWatch | None = None

    @classmethod
    async def connect(cls, address: WorkerAddress, *, timeout_s: float, key: ClusterKey | None = None) -> Peer:
        """Raises :class:`Unavailable` when nobody or somebody else answers at the address."""
        link = await FrameStream.connect(address.host, address.port, PLANE, timeout_s=timeout_s, key=key)
        try:
            async with asyncio.timeout(timeout_s):
                hello, load = await link.receive(), await link.receive()
        except (TimeoutError, ProtocolError) as error:
            link.abort()
            raise Unavailable(f"{address.worker_id} did not say hello: {error}") from None
        except asyncio.CancelledError:
            link.abort()
            raise
        if not isinstance(hello, Hello) or not isinstance(load, Load) or hello.generation != address.generation:
            link.abort()
            raise Unavailable(f"{address.host}:{address.port} is not {address.worker_id} of this generation any more")
        return cls(address, link, hello, load)

    @property
    def load(self) -> Load:
        return self._load

    @property
    def load_age_s(self) -> float:
        return time.monotonic() - self._load_s

    def view(self) -> WorkerView:
        unseen = self._unseen.values()
        return WorkerView(
            self.address.worker_id,
            self._load,
            len(unseen),
            sum(tokens for tokens, _ in unseen),
            sum(computed for _, computed in unseen),
            self.handoffs.token_s,
        )

    def watch_cache(self, index: PrefixIndex) -> None:
        """From now on ``index`` knows what the worker's prefix cache holds."""

        def ask() -> None:
            with contextlib.suppress(Unavailable):  # it is gone, as :meth:`listen` learns too
                self._link.send(WatchCache())

        self._cache = CacheWatch(index, self.address.generation, ask)
        self._cache.begin()

    @contextlib.contextmanager
    def attached(self, request_id: str, sink: Sink, tokens: int, *, computes: int) -> Iterator[None]:
        """While open, records about ``request_id`` go to ``sink``; on the way out the worker is told to free it.

        ``tokens`` of prompt will take pages there; computes: how many of them are computed there.
        """
        self._sinks[request_id] = sink
        self._unseen[request_id] = tokens, computes
        try:
            yield
        finally:
            self._unseen.pop(request_id, None)
            if self._sinks.pop(request_id, None) is not None:
                with contextlib.suppress(Unavailable):
                    self._link.send(Cancel(request_id))

    def send(self, record: object) -> None:
        """Raises :class:`Unavailable` when the worker is gone."""
        self._link.send(record)

    def close(self) -> None:
        """Drops the connection; :meth:`listen` then ends."""
        self._link.abort()

    async def listen(self) -> None:
        """Delivers records until the connection ends; then every attached stream gets a Failed."""
        try:
            while (record := await self._link.receive()) is not None:
                self.suspicion.heard(time.monotonic())
                self._deliver(record)
        except ProtocolError as error:
            log.error("%s: %s; connection closed", self.address.worker_id, error)
        finally:
            self._link.abort()
            if self._cache is not None:
                self._cache.end()
            self._fail_all("lost")

    def check(self, now_s: float) -> None:
        """Gives up what a silent worker has: its streams go on elsewhere, and should it wake up it is told so."""
        if not self._sinks or not self.suspicion.silent(now_s):
            return
        log.warning("%s %s is silent", self.address.role, self.address.worker_id)
        self.suspicion.strike(now_s)
        with contextlib.suppress(Unavailable):
            for request_id in self._sinks:
                self._link.send(Cancel(request_id))
        self._fail_all("silent")

    def _fail_all(self, how: Literal["lost", "silent"]) -> None:
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            message = f"{self.address.role} worker {how}"
            sink(self, Failed(request_id, Unavailable.code, message, reason=f"{self.address.role}_{how}"))

    def _deliver(self, record: object) -> None:
        match record:
            case Load():
                self._load, self._load_s = record, time.monotonic()
                self._unseen.clear()
            case Tokens():
                self._deliver_tokens(record)
            case Granted(ticket=ticket):
                self._to_sink(ticket.request_id, record)
            case Report() | Handed():
                self._to_sink(record.request_id, record)
            case CacheEvents() if self._cache is not None:
                self._cache.told(record)
            case Draining():
                self.draining = True
            case Failed():
                sink = self._sinks.pop(record.request_id, None)  # the worker holds nothing of it any more
                if sink is not None:
                    sink(self, record)
            case _:
                raise ProtocolError(f"unexpected {type(record).__name__} from a worker")

    def _deliver_tokens(self, record: Tokens) -> None:
        """Events of one step, grouped per request in their order."""
        if len(record.events) == 1:
            self._to_sink(record.events[0].request_id, record)
            return
        grouped: dict[str, list[TokenEvent]] = {}
        for event in record.events:
            grouped.setdefault(event.request_id, []).append(event)
        for request_id, group in grouped.items():
            self._to_sink(request_id, Tokens(tuple(group)))

    def _to_sink(self, request_id: str, record: object) -> None:
        sink = self._sinks.get(request_id)
        if sink is not None:
            sink(self, record)


class Pools:
    """The connected workers of both roles. :meth:`update` gets every new list from the directory."""

    def __init__(self, *, connect_s: float, key: ClusterKey | None = None, watch_caches: bool = True) -> None:
        """``key``: what both ends of a connection prove; None for workers that let everybody in.

        watch_caches: ``index`` learns what workers have cached; otherwise it stays empty.
        """
        self._connect_s, self._key, self._watch_caches = connect_s, key, watch_caches
        self.index = PrefixIndex()  # workers by generation
        self._peers: dict[str, Peer] = {}  # by generation
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._listed: dict[Role, dict[str, WorkerAddress]] = {"prefill": {}, "decode": {}}
        self._watch: asyncio.Task[None] | None = None
        self._lost_s: dict[Role, float] = {"prefill": -math.inf, "decode": -math.inf}  # when a connection last ended

    def update(self, role: Role, addresses: Iterable[WorkerAddress]) -> None:
        """Connects to new workers. One that is no longer listed gets no new streams, but keeps those it has.

        One that is listed again, as Serve does while it updates a deployment, has its connection still.
        """
        self._watch = self._watch or asyncio.create_task(self._check_all(), name="silence")
        listed = {address.generation: address for address in addresses}
        gone, self._listed[role] = self._listed[role].keys() - listed.keys(), listed
        for generation in (gone - self._peers.keys()) & self._keepers.keys():
            self._keepers[generation].cancel()
        for generation in listed.keys() - {name for name, keeper in self._keepers.items() if _goes_on(keeper)}:
            keeper = asyncio.create_task(self._keep(listed[generation]), name=generation)
            keeper.add_done_callback(self._forget)
            self._keepers[generation] = keeper

    def of(self, role: Role) -> list[Peer]:
        """Workers of ``role`` that may get requests: connected, listed, not leaving, not silent.

        Those that failed too often lately are among them only if there are no others.
        """
        now_s = time.monotonic()
        connected = [self._peers[generation] for generation in self._listed[role] if generation in self._peers]
        able = [peer for peer in connected if not (peer.draining or peer.suspicion.silent(now_s))]
        return [peer for peer in able if not peer.suspicion.shunned(now_s)] or able

    def known(self, role: Role) -> list[tuple[WorkerAddress, Peer | None, bool]]:
        """Every worker of ``role`` by id, its connection if there is one, and whether the directory still names it."""
        listed = self._listed[role]
        leaving = [p.address for g, p in self._peers.items() if p.address.role == role and g not in listed]
        addresses = sorted([*listed.values(), *leaving], key=lambda address: address.worker_id)
        return [(a, self._peers.get(a.generation), a.generation in listed) for a in addresses]

    def lost_s(self, role: Role) -> float:
        """Seconds since the last loss of a worker of ``role``: inf before any; 0 while one is silent or leaving."""
        held = any(peer.address.role == role for peer in self._peers.values())
        return 0.0 if held else time.monotonic() - self._lost_s[role]

    @property
    def hello(self) -> Hello | None:
        """What some connected worker said of itself; they all serve the same model in the same layout."""
        return next((peer.hello for peer in self._peers.values()), None)

    async def close(self) -> None:
        keepers = [*self._keepers.values(), *([self._watch] if self._watch is not None else [])]
        for keeper in keepers:
            keeper.cancel()
        if keepers:
            await asyncio.wait(keepers, timeout=1.0)

    def _forget(self, ended: asyncio.Task[None]) -> None:
        if self._keepers.get(ended.get_name()) is ended:  # not another one that has taken over
            del self._keepers[ended.get_name()]

    async def _check_all(self) -> None:
        """Looks for silent workers. Where this process itself was held up, what came meanwhile is read first."""
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            now_s = time.monotonic()
            if now_s - last_s < 2 * CHECK_S:
                for peer in list(self._peers.values()):
                    peer.check(now_s)
            last_s = now_s

    async def _keep(self, address: WorkerAddress) -> None:
        """Stays connected to one worker while the directory lists it."""
        attempt = 0
        while address.generation in self._listed[address.role]:
            try:
                peer = await Peer.connect(address, timeout_s=self._connect_s, key=self._key)
            except Unavailable as error:
                log.info("%s %s: %s", address.role, address.worker_id, error)
                await asyncio.sleep(RECONNECT_S[min(attempt, len(RECONNECT_S) - 1)])
                attempt += 1
                continue
            log.info("%s %s connected at %s:%d", address.role, address.worker_id, address.host, address.port)
            attempt = 0
            self._peers[address.generation] = peer
            try:
                if self._watch_caches:
                    peer.watch_cache(self.index)
                await peer.listen()
            finally:
                del self._peers[address.generation]
                self._lost_s[address.role] = time.monotonic()
            log.warning("%s %s lost", address.role, address.worker_id)


def _goes_on(keeper: asyncio.Task[None]) -> bool:
    """Whether ``keeper`` will look at the directory's list once more before it ends."""
    return not keeper.done() and not keeper.cancelling()
