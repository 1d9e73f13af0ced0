"""The decode side of the handoff: leases are granted, announced blocks pulled, verified, decoded and written."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from baton.config_handoff import AUTO, CODECS, FLOORS, HandoffConfig, codecs_within
from baton.errors import ConfigError, Overloaded
from baton.guard import Guard
from baton.layout import DTYPES, KVLayout
from baton.messages import Ticket
from kvtransfer.arena import BufferPool
from kvtransfer.codec_speeds import measure_codecs
from kvtransfer.handoff import Expired, Landed, Limits, Lost
from kvtransfer.intakes import Intakes
from kvtransfer.landing import Lander, Puller, Write
from kvtransfer.pages import Accelerator
from kvtransfer.protocol import CONTROL, DecodeSpeed
from kvtransfer.receiver_link import Ground, ReceiverLink
from kvtransfer.signing import BlockKey
from kvtransfer.transports import make_fetcher
from kvtransfer.wire import Wire

log = logging.getLogger(__name__)

MAX_LINKS = 256
MAX_LEASES = 4096


@dataclass(frozen=True, slots=True)
class ReceiverStats:
    leases: int  # reserved or under way
    landing_bytes_used: int
    landing_bytes_total: int
    quarantined_bytes: int
    transport: str


class Receiver:
    """One per decode worker. Methods run on the event loop that ran ``start``."""

    def __init__(
        self, layout: KVLayout, config: HandoffConfig,
        *, worker_id: str, generation: str, host: str = "127.0.0.1", guard: Guard | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        """``guard``: who may connect; None lets everybody in. ``accelerator``: where KV is decoded whose pages lie
        there."""
        self.host, self.port = host, 0
        self._layout, self._config = layout, config
        self._worker_id, self._generation = worker_id, generation
        self._guard, self._accelerator = guard or Guard(), accelerator
        self._pool = BufferPool(config.landing_bytes)
        self._wires: dict[str, Wire] = {dtype: Wire(replace(layout, dtype=dtype)) for dtype in DTYPES}
        self._block_bytes = max(wire.largest_block for wire in self._wires.values())
        self._intakes = Intakes(layout, Limits(config.lease_s, config.stall_s))
        self._links: dict[ReceiverLink, asyncio.Task[None]] = {}
        self._retiring: list[Puller] = []
        self._ground: Ground | None = None
        self._unpin: Callable[[], None] | None = None

    async def start(self) -> None:
        """Registers the landing memory with the transport and the accelerator, and listens.

        Raises :class:`baton.errors.ConfigError`.
        """
        if self._pool.memory.nbytes < self._block_bytes:
            raise ConfigError(f"must hold one block of {self._block_bytes} bytes", field="handoff.landing_bytes")
        build = partial(
            make_fetcher, self._config.transport, self._pool.memory,
            name=f"{self._worker_id}-{self._generation}", ucx_tls=self._config.ucx_tls, tls=self._config.tls,
        )  # fmt: skip
        fetcher = await asyncio.to_thread(build)
        if self._accelerator is not None:
            self._unpin = self._accelerator.pin(self._pool.memory, "handoff.landing_bytes")
        names = codecs_within(self._config.quality_floor)
        measured = await asyncio.to_thread(measure_codecs, self._layout, names, accelerator=self._accelerator)
        key = BlockKey(self._guard.key) if self._guard.key else None
        self._ground = Ground(
            self._worker_id, self._generation, self._layout.family, self._config.transport, self._config.stall_s,
            self._intakes, self._wires, self._pool, fetcher,
            Lander(self._layout, self._pool, key, self._accelerator),
            tuple(DecodeSpeed(one.name, one.decode.block_s, one.decode.bytes_per_s) for one in measured),
        )  # fmt: skip
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._ticker = asyncio.create_task(self._tick())
        log.info("%s receives KV on %s:%d over %s", self._worker_id, self.host, self.port, self._config.transport)

    async def close(self) -> None:
        """Loses every handoff under way and frees everything."""
        ground, self._ground = self._ground, None
        if ground is None:
            return
        self._server.close()
        self._guard.close()
        self._ticker.cancel()
        self._intakes.lose_all("the receiver closes")
        for link in list(self._links):
            link.close("the receiver closes")
        await asyncio.gather(*self._links.values())
        await asyncio.to_thread(self._close_threads, ground)

    def _close_threads(self, ground: Ground) -> None:
        deadline = time.monotonic() + self._config.stall_s
        for puller in self._retiring:
            puller.join(max(0.0, deadline - time.monotonic()))
        ground.lander.close()
        unended = len(self._retiring) - len(self._sweep(self._retiring))
        if unended:
            # Closing the agent under a transfer that may still write would free memory it writes to.
            log.warning("%d peers have transfers that did not end; their buffers stay", unended)
        else:
            ground.fetcher.close()
        if self._unpin is not None:  # no copy of the accelerator's is under way any more: the lander has ended
            self._unpin()

    def reserve(
        self, request_id: str, epoch: int,
        *, tokens: int, codec: str, floor: str = "exact", budget_s: float, write: Write,
    ) -> Ticket:  # fmt: skip
        """Grants a lease for one attempt; every reserved request must be released.

        ``codec``: of every block, or "auto": any that ``floor`` allows, as the sender chooses block by block.
        ``write(layer, start, keys, values)`` runs on the landing thread, one call at a time, with keys and values
        [count, kv_heads, head_dim] of this side's dtype, whatever the sender's, that are valid during the call only.
        Or ``write`` says where they lie on the accelerator, and they are there when it has been called for the block.
        Blocks come in any order, each (layer, token) at most once. Raises :class:`Overloaded` when the landing side is
        saturated.
        """
        if self._ground is None:
            raise RuntimeError("the receiver is not started")
        if tokens < 1 or codec not in (AUTO, *CODECS) or floor not in FLOORS:
            raise ValueError(f"{tokens} tokens in codec {codec!r} with floor {floor!r}")
        self._intakes.reserve(
            request_id, epoch, tokens=tokens, codec=codec, floor=floor,
            budget_s=budget_s, capacity=self._capacity(), write=write,
        )  # fmt: skip
        return Ticket(
            request_id, epoch, self.host, self.port, self._generation,
            self._layout.family, codec, self._config.transport, floor,
        )  # fmt: skip

    def _capacity(self) -> int:
        """Leases for which there is at least one landing buffer each."""
        stats = self._pool.stats()
        usable = stats.total_bytes - stats.quarantined_bytes
        if usable < self._block_bytes:
            raise Overloaded(f"{stats.quarantined_bytes} of {stats.total_bytes} landing bytes are quarantined")
        return min(MAX_LEASES, usable // self._block_bytes)

    async def outcome(self, request_id: str) -> Landed | Lost | Expired:
        """How the handoff ended; bounded by its budget and by the stall limit."""
        intake = self._intakes.get(request_id)
        if intake is None:
            return Lost("not reserved here")
        await intake.over.wait()
        assert intake.lease.outcome is not None
        return intake.lease.outcome

    async def release(self, request_id: str) -> None:
        """Ends the lease, giving up a handoff under way; when it returns nothing writes this request's pages."""
        intake = self._intakes.get(request_id)
        if intake is None:
            return
        intake.lose("released by the decode worker")
        await intake.quiet()
        self._intakes.forget(intake)

    def carrier(self, request_id: str) -> str:
        """What carries the blocks of a handoff under way, as the transport itself says; empty when none has begun."""
        intake = self._intakes.get(request_id)
        peer = 0 if intake is None else intake.lease.peer
        pullers = (link.puller for link in self._links if link.peer == peer)
        return next((puller.carrier() for puller in pullers if puller is not None), "")

    def stats(self) -> ReceiverStats:
        landing = self._pool.stats()
        return ReceiverStats(
            self._intakes.active, landing.used_bytes, landing.total_bytes, landing.quarantined_bytes,
            self._config.transport,
        )  # fmt: skip

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = await self._guard.accept(reader, writer, CONTROL)
        if stream is None:
            return
        if self._ground is None or len(self._links) >= MAX_LINKS:
            stream.abort()
            return
        link = ReceiverLink(self._ground, stream)
        task = asyncio.current_task()
        assert task is not None
        self._links[link] = task
        try:
            await link.serve()
        finally:
            del self._links[link]
            if link.puller is not None:
                self._retiring.append(link.puller)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(min(0.25, self._config.stall_s / 8))
            now = time.monotonic()
            self._intakes.tick(now)
            for link in list(self._links):
                link.tick(now)
            if self._retiring or self._pool.stats().quarantined_bytes:
                retired = await asyncio.to_thread(self._sweep, list(self._retiring))
                self._retiring = [puller for puller in self._retiring if puller not in retired]

    def _sweep(self, retiring: list[Puller]) -> list[Puller]:
        """Frees what aborted transfers held and have released by now; returns the pullers of which nothing is left."""
        self._pool.sweep()
        return [puller for puller in retiring if puller.retire()]
