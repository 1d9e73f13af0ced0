"""The receiver's reservations and what hangs on them: a gate before the pages, a peer to answer, a waiter."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from baton.errors import Unavailable
from baton.layout import KVLayout
from kvtransfer.handoff import Arrived, Bounds, Expired, Landed, Lease, Leases, Limits, Lost
from kvtransfer.landing import Gate, Landing, Write
from kvtransfer.protocol import Ack, Begin, Commit, Complete, Drop, Parcel

Send = Callable[[object], None]


class Intake:
    """One lease and its surroundings. The landing threads report through the event loop, so only it changes a lease."""

    def __init__(self, lease: Lease, write: Write, settle: Callable[[Intake], None], under_way: set[Intake]) -> None:
        self.lease = lease
        self._under_way = under_way
        self.over = asyncio.Event()
        self._quiet = asyncio.Event()
        self._settle = settle
        self._send: Send | None = None
        self._loop = asyncio.get_running_loop()
        self.landing = Landing(
            Gate(partial(self._post, self._quiet.set)), write,
            on_arrived=partial(self._post, self.arrived), on_lost=partial(self._post, self.lose),
        )  # fmt: skip

    def begin(self, peer: int, begin: Begin, send: Send, dtype: str) -> None:
        """``dtype``: of the peer's KV."""
        if self._send is None:
            self._send = send
            self._under_way.add(self)
        self.lease.begin(peer, begin, time.monotonic(), dtype)
        self._settle(self)

    def announce(self, parcel: Parcel, bounds: Bounds) -> bool:
        """True when ``parcel`` is to be fetched."""
        accepted = self.lease.announce(parcel, time.monotonic(), bounds)
        self._settle(self)
        return accepted

    def commit(self, commit: Commit) -> None:
        self.lease.commit(commit, time.monotonic())
        self._settle(self)

    def arrived(self, arrived: Arrived) -> None:
        """A parcel is in the pages."""
        lease = self.lease
        if lease.outcome is None:
            landing = len(self._under_way)
            self.answer(Ack(lease.request_id, lease.epoch, arrived.seq, arrived.fetch_s, landing, arrived.fetch_cpu_s))
        lease.landed(arrived, time.monotonic())
        self._settle(self)

    def lose(self, reason: str) -> None:
        self.lease.lose(reason)
        self._settle(self)

    def answer(self, record: object) -> None:
        """Tells the peer, if one has begun; the link's own end is what loses handoffs, not a failed answer."""
        if self._send is not None:
            with contextlib.suppress(Unavailable):
                self._send(record)

    async def quiet(self) -> None:
        """Returns when no thread writes this request's pages and none will. The lease must be over."""
        await self._quiet.wait()

    def _post(self, call: Callable[..., object], *args: Any) -> None:
        self._loop.call_soon_threadsafe(call, *args)


class Intakes:
    def __init__(self, layout: KVLayout, limits: Limits) -> None:
        self._leases = Leases(layout, limits)
        self._intakes: dict[str, Intake] = {}
        self._under_way: set[Intake] = set()  # begun, and not over

    @property
    def active(self) -> int:
        return self._leases.active

    def reserve(
        self, request_id: str, epoch: int,
        *, tokens: int, codec: str, floor: str, budget_s: float, capacity: int, write: Write,
    ) -> Intake:  # fmt: skip
        """Raises :class:`Overloaded` beyond ``capacity`` leases and ValueError for a stale epoch."""
        lease = self._leases.reserve(
            request_id, epoch, tokens=tokens, codec=codec, floor=floor,
            budget_s=budget_s, capacity=capacity, now=time.monotonic(),
        )  # fmt: skip
        intake = self._intakes[request_id] = Intake(lease, write, self._settle, self._under_way)
        return intake

    def get(self, request_id: str) -> Intake | None:
        return self._intakes.get(request_id)

    def find(self, request_id: str, epoch: int, peer: int) -> Intake | None:
        """The intake that a message of ``peer`` may change; None for a stale epoch or somebody else's."""
        return None if self._leases.find(request_id, epoch, peer) is None else self._intakes[request_id]

    def hear(self, peer: int) -> None:
        """``peer`` gave a sign of life."""
        self._leases.hear(peer, time.monotonic())

    def lose_peer(self, peer: int, reason: str) -> None:
        """``peer`` is gone, and with it every handoff that it fed."""
        self._leases.gone(peer)
        for lease in self._leases.of_peer(peer):
            self._intakes[lease.request_id].lose(reason)

    def feeds(self, peer: int) -> bool:
        """Whether a handoff from ``peer`` is under way."""
        return bool(self._leases.of_peer(peer))

    def forget(self, intake: Intake) -> None:
        self._leases.forget(intake.lease)
        if self._intakes.get(intake.lease.request_id) is intake:
            del self._intakes[intake.lease.request_id]

    def lose_all(self, reason: str) -> None:
        for intake in list(self._intakes.values()):
            intake.lose(reason)

    def tick(self, now: float) -> None:
        for lease in self._leases.tick(now):
            self._settle(self._intakes[lease.request_id])

    def _settle(self, intake: Intake) -> None:
        """Once there is an outcome: closes the gate, tells the peer, wakes whoever waits."""
        lease = intake.lease
        if lease.outcome is None or intake.over.is_set():
            return
        intake.over.set()
        self._under_way.discard(intake)
        intake.landing.gate.close()
        match lease.outcome:
            case Landed() as landed:
                complete = Complete(
                    lease.request_id, lease.epoch, landed.wire_s, landed.land_s, landed.busy_s, landed.bytes,
                    dict(landed.codec_tokens),
                )  # fmt: skip
                intake.answer(complete)
            case Lost(reason) | Expired(reason):
                intake.answer(Drop(lease.request_id, lease.epoch, reason))
