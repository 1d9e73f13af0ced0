"""The sender's end of one control connection, shared by every handoff to the same receiver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from baton.errors import ProtocolError, Unavailable
from baton.frames import FrameStream
from baton.secure import ClusterKey
from kvtransfer.protocol import CONTROL, Ack, Alive, Attach, Complete, Drop, Refused, Welcome

log = logging.getLogger(__name__)

_MAX_DISMISSED = 4096


class Rider(Protocol):
    """A handoff that travels over a link."""

    request_id: str
    epoch: int

    @property
    def unacknowledged(self) -> bool:
        """Parcels are announced for which no acknowledgement came yet."""

    def joined(self, link: SenderLink) -> None: ...
    def attached(self) -> None: ...
    def received(self, record: Ack | Complete | Drop) -> None: ...
    def lose(self, reason: str) -> None: ...


class SenderLink:
    """Connects at once; its end, for whatever reason, loses every handoff on it."""

    def __init__(
        self, host: str, port: int, attach: Attach,
        *, stall_s: float, on_end: Callable[[SenderLink], None],
        on_welcome: Callable[[Welcome], None], key: ClusterKey | None = None,
    ) -> None:  # fmt: skip
        self._host, self._port, self._attach, self._stall_s, self._on_end = host, port, attach, stall_s, on_end
        self._key, self._on_welcome = key, on_welcome
        self._riders: dict[tuple[str, int], Rider] = {}
        self._stream: FrameStream | None = None
        self._welcome = False
        self._dismissed: list[Drop] = []
        self.broken = False  # takes no more handoffs
        self._heard_at = self._progress_at = self._sent_at = time.monotonic()
        self._landed = 0  # what the peer last said
        self._task = asyncio.create_task(self._run(), name=f"kv-link-{host}:{port}")

    def add(self, rider: Rider) -> None:
        key = (rider.request_id, rider.epoch)
        if key in self._riders:
            rider.lose("this attempt is already under way")
            return
        self._quiet_until_now()
        self._riders[key] = rider
        rider.joined(self)
        if self._welcome:
            rider.attached()

    def remove(self, rider: Rider) -> None:
        self._riders.pop((rider.request_id, rider.epoch), None)

    def dismiss(self, drop: Drop) -> None:
        """Tells the peer of a handoff that ended here, now or as soon as it listens: its lease is not to wait."""
        if self._welcome:
            self.send(drop)
        elif len(self._dismissed) < _MAX_DISMISSED:
            self._dismissed.append(drop)

    def send(self, *records: object) -> None:
        """Raises nothing: a broken connection ends the link, which loses its handoffs."""
        if self._stream is None:
            return
        self._sent_at = time.monotonic()
        try:
            self._stream.send(*records)
        except Unavailable as error:
            log.info("kv link to %s:%d: %s", self._host, self._port, error)
            self._stream.abort()

    def tick(self, now: float) -> None:
        """Sends a heartbeat while handoffs are under way, and cuts a peer that gives no sign of life or of progress."""
        if not self._riders or not self._welcome or self._stream is None:
            return
        if now - self._sent_at >= self._stall_s / 5:
            self.send(Alive())
        if not any(rider.unacknowledged for rider in self._riders.values()):
            self._progress_at = now
        if now - self._heard_at >= self._stall_s:
            self._cut(f"decode worker silent for {now - self._heard_at:.1f} s")
        elif now - self._progress_at >= self._stall_s:
            self._cut(f"decode worker took no parcel for {now - self._progress_at:.1f} s")

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _quiet_until_now(self) -> None:
        if not self._riders:  # an idle link hears nothing, which says nothing
            self._heard_at = self._progress_at = time.monotonic()

    async def _run(self) -> None:
        reason = "the link closed"
        try:
            async with await FrameStream.connect(
                self._host, self._port, CONTROL, timeout_s=self._stall_s, key=self._key
            ) as stream:
                self._stream = stream
                await self._introduce(stream)
                while (record := await stream.receive()) is not None:
                    self._take(record)
            reason = "decode worker closed the connection"
        except (Unavailable, ProtocolError) as error:
            reason = str(error)
        finally:
            self._welcome, self._stream = False, None
            self._on_end(self)
            self._cut(reason)

    async def _introduce(self, stream: FrameStream) -> None:
        stream.send(self._attach)
        try:
            async with asyncio.timeout(self._stall_s):
                answer = await stream.receive()
        except TimeoutError:
            raise Unavailable("decode worker did not answer") from None
        match answer:
            case Welcome(generation=self._attach.receiver_generation):
                self._on_welcome(answer)
                self._welcome = True
                self._heard_at = self._progress_at = time.monotonic()
                for rider in list(self._riders.values()):
                    rider.attached()
                for drop in self._dismissed:
                    self.send(drop)
                self._dismissed.clear()
            case Refused():
                raise Unavailable(f"decode worker refused: {answer.reason}")
            case None:
                raise Unavailable("decode worker closed the connection")
            case _:
                raise ProtocolError(f"{type(answer).__name__} instead of Welcome")

    def _take(self, record: object) -> None:
        self._heard_at = time.monotonic()
        match record:
            case Ack() | Complete() | Drop():
                if isinstance(record, Ack):
                    self._progress_at = self._heard_at
                rider = self._riders.get((record.request_id, record.epoch))
                if rider is not None:  # else it ended here first, and its last messages crossed
                    rider.received(record)
            case Alive():
                if record.landed != self._landed:  # a parcel takes it long, but it is at work
                    self._landed, self._progress_at = record.landed, self._heard_at
            case _:
                raise ProtocolError(f"{type(record).__name__} on the sender's side")

    def _cut(self, reason: str) -> None:
        """Loses every handoff and drops the connection."""
        self.broken = True
        for rider in list(self._riders.values()):
            rider.lose(reason)
        if self._stream is not None:
            self._stream.abort()
