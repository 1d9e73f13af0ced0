"""The prefill side of the handoff: layers are pushed as they are computed, staged, announced, and freed when landed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from baton.config_handoff import AUTO, CODECS, FLOORS, HandoffConfig, codecs_allowed, codecs_within
from baton.errors import ConfigError, Overloaded
from baton.layout import KVLayout
from baton.messages import Ticket
from baton.secure import ClusterKey
from kvtransfer.arena import BufferPool
from kvtransfer.chooser import Link
from kvtransfer.codec_speeds import describe, measure_codecs
from kvtransfer.codecs import largest_block, make_codec
from kvtransfer.encoder import Encoder, Gather
from kvtransfer.outgoing import Outgoing
from kvtransfer.pages import Accelerator
from kvtransfer.protocol import PROTOCOL, Attach, Welcome
from kvtransfer.route import Ratios, Route
from kvtransfer.sender_link import SenderLink
from kvtransfer.signing import BlockKey
from kvtransfer.transports import Exporter, make_exporter

log = logging.getLogger(__name__)

MAX_HANDOFFS = 4096
MAX_ROUTES = 1024


@dataclass(frozen=True, slots=True)
class SenderStats:
    handoffs: int
    staging_bytes_used: int
    staging_bytes_total: int
    transport: str


class Sender:
    """One per prefill worker. Methods run on the event loop that ran ``start`` unless they say otherwise."""

    def __init__(
        self, layout: KVLayout, config: HandoffConfig,
        *, worker_id: str, generation: str, host: str = "127.0.0.1", key: ClusterKey | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        """``key``: what both ends prove; None for receivers that let everybody in. ``accelerator``: where KV is encoded
        that ``open``'s ``gather`` leaves in its pages."""
        self.layout, self.config = layout, config
        self.worker_id, self.generation = worker_id, generation
        self._host, self._key, self._accelerator = host, key, accelerator
        self._staging = BufferPool(config.staging_bytes)
        self._outgoing: set[Outgoing] = set()
        self._links: dict[tuple[str, int, str], SenderLink] = {}  # by host, port and generation of the receiver
        self._routes: dict[str, Route] = {}  # by host and port of the receiver, oldest first
        self._exporter: Exporter | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._unpin: Callable[[], None] | None = None

    async def start(self) -> None:
        """Registers the staging memory with the transport and the accelerator.

        Raises :class:`baton.errors.ConfigError`.
        """
        block_bytes = largest_block([make_codec(name, self.layout) for name in CODECS], self.layout)
        if self._staging.memory.nbytes < block_bytes:
            raise ConfigError(f"must hold one block of {block_bytes} bytes", field="handoff.staging_bytes")
        build = partial(
            make_exporter, self.config.transport, self._staging.memory,
            name=f"{self.worker_id}-{self.generation}", host=self._host,
            ucx_tls=self.config.ucx_tls, tls=self.config.tls,
        )  # fmt: skip
        self._exporter = await asyncio.to_thread(build)
        if self._accelerator is not None:
            self._unpin = self._accelerator.pin(self._staging.memory, "handoff.staging_bytes")
        names = codecs_within(self.config.quality_floor)
        measured = await asyncio.to_thread(measure_codecs, self.layout, names, accelerator=self._accelerator)
        self._ratios = Ratios(measured, self._exporter.sending)
        block_key = BlockKey(self._key) if self._key else None
        self._encoder = Encoder(self.layout, self._staging, self._ratios, block_key, self._accelerator)
        self._ticker = asyncio.create_task(self._tick())
        log.info(
            "%s sends KV over %s; codecs here, GB/s: %s", self.worker_id, self.config.transport, describe(measured)
        )

    async def close(self) -> None:
        """Loses every handoff under way and frees everything."""
        if self._exporter is None or self._ticker is None:
            return
        for outgoing in list(self._outgoing):
            outgoing.lose("the sender closes")
        self._ticker.cancel()
        await asyncio.gather(*(link.close() for link in list(self._links.values())))
        await asyncio.to_thread(self._encoder.close)
        await asyncio.to_thread(self._exporter.close)
        self._exporter = None
        if self._unpin is not None:
            self._unpin()

    def open(self, ticket: Ticket, *, tokens: int, budget_s: float, gather: Gather) -> Outgoing:
        """Starts the handoff of ``ticket``; it is lost at once when the two workers do not fit together.

        ``gather(layer, start, count)`` runs on the encoder's thread and returns keys and values,
        [count, kv_heads, head_dim] each, which are read before it is called again; or, on an accelerator, where they
        lie, to be read before ``Outgoing.encoded`` returns. Raises :class:`Overloaded`.
        """
        if len(self._outgoing) >= MAX_HANDOFFS:
            raise Overloaded(f"{MAX_HANDOFFS} handoffs under way", retry_after_ms=100)
        mismatch = self._mismatch(ticket)
        outgoing = Outgoing(
            self._encoder, self.layout, ticket, self._route(ticket),
            allowed=() if mismatch else codecs_allowed(ticket.codec, ticket.floor),
            tokens=tokens, budget_s=budget_s, gather=gather, on_over=self._outgoing.discard,
        )  # fmt: skip
        self._outgoing.add(outgoing)
        if mismatch:
            outgoing.lose(mismatch)
        else:
            self._link(ticket).add(outgoing)
        return outgoing

    def link_to(self, ticket: Ticket) -> Link:
        """What is measured by now of the way to the ticket's receiver."""
        with self._encoder.changed:
            return self._route(ticket).link

    def _link(self, ticket: Ticket) -> SenderLink:
        """The connection to the ticket's receiver, opened on first use."""
        key = (ticket.host, ticket.port, ticket.generation)
        link = self._links.get(key)
        if link is None or link.broken:
            if self._exporter is None:
                raise RuntimeError("the sender is not started")
            attach = Attach(
                PROTOCOL, self.worker_id, self.generation, ticket.generation, self.layout.family,
                self.layout.dtype, self.config.transport, self._exporter.address(), self._staging.memory.nbytes,
            )  # fmt: skip
            link = self._links[key] = SenderLink(
                ticket.host, ticket.port, attach,
                stall_s=self.config.stall_s, on_end=partial(self._unlink, key),
                on_welcome=partial(self._welcomed, self._route(ticket)), key=self._key,
            )  # fmt: skip
        return link

    def _route(self, ticket: Ticket) -> Route:
        """What is known of the way to the ticket's receiver, through all its generations."""
        peer = f"{ticket.host}:{ticket.port}"
        route = self._routes.pop(peer, None) or Route(self._ratios)
        self._routes[peer] = route
        while len(self._routes) > MAX_ROUTES:
            del self._routes[next(iter(self._routes))]
        return route

    def _welcomed(self, route: Route, welcome: Welcome) -> None:
        with self._encoder.changed:
            route.welcomed(welcome)
        if welcome.probe is not None:
            log.info(
                "%s reaches %s at %.2f GB/s, %.3f ms a fetch", self.worker_id, welcome.worker_id,
                welcome.probe.bytes_per_s / 1e9, welcome.probe.latency_s * 1e3,
            )  # fmt: skip

    def _unlink(self, key: tuple[str, int, str], link: SenderLink) -> None:
        if self._links.get(key) is link:  # a broken link may have been replaced before it ended
            del self._links[key]

    def _mismatch(self, ticket: Ticket) -> str:
        if ticket.layout != self.layout.family:
            return f"KV layout {ticket.layout} is not this worker's {self.layout.family}"
        if ticket.transport != self.config.transport:
            return f"transport {ticket.transport} is not this worker's {self.config.transport}"
        if ticket.codec not in (AUTO, *CODECS) or ticket.floor not in FLOORS:
            return f"codec {ticket.codec!r} with floor {ticket.floor!r}"
        return ""

    def stats(self) -> SenderStats:
        staging = self._staging.stats()
        return SenderStats(len(self._outgoing), staging.used_bytes, staging.total_bytes, self.config.transport)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(min(0.25, self.config.stall_s / 8))
            now = time.monotonic()
            for outgoing in list(self._outgoing):
                outgoing.tick(now)
            for link in list(self._links.values()):
                link.tick(now)
