"""The receiver's end of one control connection: what one sender announces is checked here and passed to its puller."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass

from baton.errors import ProtocolError, Unavailable
from baton.frames import FrameStream
from kvtransfer.arena import BufferPool
from kvtransfer.handoff import Bounds
from kvtransfer.intakes import Intake, Intakes
from kvtransfer.landing import Lander, Puller
from kvtransfer.link_meter import PROBE_BYTES
from kvtransfer.link_probe import probe_link
from kvtransfer.processor import cores
from kvtransfer.protocol import (
    PROTOCOL,
    Alive,
    Attach,
    Begin,
    Commit,
    DecodeSpeed,
    Drop,
    Parcel,
    Probed,
    Refused,
    Welcome,
)
from kvtransfer.transports import Fetcher, FetchLost, Source
from kvtransfer.wire import Wire

log = logging.getLogger(__name__)

PARCELS_IN_POOL = 64  # so many peers may stop at once, a fetch each, before a large pool is all in quarantine

_peers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Ground:
    """What every link of one receiver shares."""

    worker_id: str
    generation: str
    family: str  # of the layout
    transport: str
    stall_s: float
    intakes: Intakes
    wires: dict[str, Wire]  # by the sender's dtype
    pool: BufferPool
    fetcher: Fetcher
    lander: Lander
    speeds: tuple[DecodeSpeed, ...]


class ReceiverLink:
    """Serves one sender until either end closes; then its leases are lost and its puller stopped."""

    def __init__(self, ground: Ground, stream: FrameStream) -> None:
        self._ground, self._stream = ground, stream
        self.peer = next(_peers)
        self._sent_at = time.monotonic()
        self._broken = ""
        self._loop = asyncio.get_running_loop()
        self.puller: Puller | None = None

    async def serve(self) -> None:
        reason = "prefill worker closed the connection"
        try:
            self.puller = await self._welcome()
            while self.puller is not None and (record := await self._stream.receive()) is not None:
                self._take(record, self.puller)
        except (ProtocolError, Unavailable) as error:
            reason = str(error)
        finally:
            self._end(self._broken or reason)

    def close(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._stream.abort()

    def tick(self, now: float) -> None:
        """Sends a heartbeat while the sender has leases here."""
        if now - self._sent_at >= self._ground.stall_s / 5 and self._ground.intakes.feeds(self.peer):
            try:
                self._send(Alive(self._ground.lander.landed))
            except Unavailable as error:
                self.close(str(error))

    async def _welcome(self) -> Puller | None:
        """The puller of a sender that fits, or None after a refusal."""
        ground = self._ground
        try:
            async with asyncio.timeout(ground.stall_s):
                attach = await self._stream.receive()
        except TimeoutError:
            raise Unavailable("nobody introduced itself") from None
        if not isinstance(attach, Attach):
            raise ProtocolError("the first record is not Attach")
        reason = self._mismatch(attach)
        source = probe = None
        if not reason:
            try:
                source, probe = await asyncio.to_thread(self._connect, attach)
            except FetchLost as error:
                reason = str(error)
        if source is None:
            log.warning("sender %s refused: %s", attach.worker_id, reason)
            self._send(Refused(reason))
            await self._stream.close()
            return None
        log.info(
            "%s receives %s from %s over %s: %s",
            ground.worker_id, attach.dtype, attach.worker_id, ground.transport, source.carrier(),
        )  # fmt: skip
        self._wire = ground.wires[attach.dtype]
        self._bounds = Bounds(self._wire.bound, ground.pool.memory.nbytes // PARCELS_IN_POOL)
        puller = Puller(
            source, ground.pool, ground.lander, self._wire.layout,
            stall_s=ground.stall_s, on_broken=self._break, name=attach.worker_id,
        )  # fmt: skip
        self._send(
            Welcome(ground.worker_id, ground.generation, ground.speeds, probe, cores(), self._bounds.parcel_bytes)
        )
        return puller

    def _connect(self, attach: Attach) -> tuple[Source, Probed | None]:
        """Blocks. The peer's memory, and what fetching from it is like. Raises :class:`FetchLost`."""
        ground = self._ground
        source = ground.fetcher.connect(attach.address, ground.stall_s)
        if attach.staging_bytes < PROBE_BYTES:
            return source, None
        try:
            link = probe_link(source, ground.pool, timeout_s=ground.stall_s)
        except FetchLost:
            source.close()
            raise
        return source, None if link is None else Probed(link.latency_s, link.bytes_per_s)

    def _break(self, reason: str) -> None:
        """The puller's thread lost the data connection."""
        self._loop.call_soon_threadsafe(self.close, reason)

    def _mismatch(self, attach: Attach) -> str:
        ground = self._ground
        if attach.protocol != PROTOCOL:
            return f"handoff protocol {attach.protocol}, this worker speaks {PROTOCOL}"
        if attach.receiver_generation != ground.generation:
            return f"generation {attach.receiver_generation} is gone, this is {ground.generation}"
        if attach.layout != ground.family:
            return f"KV layout {attach.layout} is not this worker's {ground.family}"
        if attach.dtype not in ground.wires:
            return f"KV dtype {attach.dtype!r}"
        return "" if attach.transport == ground.transport else f"transport {attach.transport}, not {ground.transport}"

    def _take(self, record: object, puller: Puller) -> None:
        if not isinstance(record, Begin | Parcel | Commit | Drop | Alive):
            raise ProtocolError(f"{type(record).__name__} on the receiver's side")
        self._ground.intakes.hear(self.peer)
        if isinstance(record, Alive):
            return
        intake = self._ground.intakes.find(record.request_id, record.epoch, self.peer)
        if intake is not None:
            self._apply(record, intake, puller)
        elif isinstance(record, Begin):
            self._send(Drop(record.request_id, record.epoch, f"no lease for epoch {record.epoch}"))

    def _apply(self, record: Begin | Parcel | Commit | Drop, intake: Intake, puller: Puller) -> None:
        match record:
            case Begin():
                intake.begin(self.peer, record, self._send, self._wire.layout.dtype)
            case Parcel():
                if intake.announce(record, self._bounds):
                    puller.pull(record, intake.landing)
            case Commit():
                intake.commit(record)
            case Drop():
                intake.lose(f"prefill worker: {record.reason}")

    def _send(self, record: object) -> None:
        self._sent_at = time.monotonic()
        self._stream.send(record)

    def _end(self, reason: str) -> None:
        self._ground.intakes.lose_peer(self.peer, reason)
        if self.puller is not None:
            self.puller.stop()
        self._stream.abort()
