"""One handoff on its way out of a prefill worker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from baton.layout import KVLayout
from baton.messages import Ticket
from baton.request import TokenEvent
from kvtransfer.coverage import Coverage, Span
from kvtransfer.encoder import Encoder, Feed, Gather
from kvtransfer.handoff import Dispatch, Expired, Landed, Lost
from kvtransfer.protocol import Ack, Begin, Complete, Drop, Parcel
from kvtransfer.route import Route
from kvtransfer.sender_link import SenderLink


class Outgoing:
    """``push``, ``finish`` and ``abort`` may be called from any thread; the rest belongs to the event loop."""

    def __init__(
        self, encoder: Encoder, layout: KVLayout, ticket: Ticket, route: Route,
        *, allowed: tuple[str, ...], tokens: int, budget_s: float, gather: Gather,
        on_over: Callable[[Outgoing], None],
    ) -> None:  # fmt: skip
        self._encoder, self._ticket, self._tokens, self._on_over = encoder, ticket, tokens, on_over
        self._loop = asyncio.get_running_loop()
        self.request_id, self.epoch = ticket.request_id, ticket.epoch
        self._dispatch = Dispatch(
            ticket.request_id, ticket.epoch, Coverage(layout.layers, tokens), time.monotonic() + budget_s
        )
        self._feed = Feed(
            self._dispatch, allowed, f"{ticket.host}:{ticket.port}", route, gather,
            on_staged=self._staged,
            on_idle=partial(self._post, self._wake),
            on_failed=partial(self._post, self.lose),
        )  # fmt: skip
        self._link: SenderLink | None = None
        self._attached = False
        self._unsent: deque[Parcel] = deque()  # staged, and the peer does not know
        self._announcing = False  # a call of ``_announce`` is on its way
        self._told = 0  # parcels of which the peer knows
        self._over = asyncio.Event()
        self._moved = asyncio.Event()
        encoder.add(self._feed)

    def push(self, layer: int, start: int, count: int) -> None:
        """Tokens [start, start + count) of ``layer`` are computed: stage and announce them. Returns at once."""
        if not self._encoder.push(self._feed, Span(layer, start, count)):
            self._post(self._settle)

    def finish(self, first: TokenEvent) -> None:
        """Prefill is over and ``first`` sampled; nothing is pushed after this."""
        with self._encoder.changed:
            self._dispatch.finish(first, time.monotonic())
        self._post(self._advance)

    def abort(self, reason: str) -> None:
        """Gives the handoff up."""
        self._post(self.lose, reason)

    async def encoded(self) -> None:
        """Returns when every pushed span has been read from the caller's pages, or never will be."""
        while True:
            with self._encoder.changed:
                if self._feed.idle:
                    return
            self._moved.clear()
            await self._moved.wait()

    async def caught_up(self) -> None:
        """Returns when every pushed span is in the receiver's pages, or never will be."""
        while True:
            with self._encoder.changed:
                if self._over.is_set() or not (self._dispatch.unstaged or self._dispatch.unacked):
                    return
            self._moved.clear()
            await self._moved.wait()

    async def outcome(self) -> Landed | Lost | Expired:
        """How it ended; bounded by the budget and by the stall limit."""
        await self._over.wait()
        assert self._dispatch.outcome is not None
        return self._dispatch.outcome

    def lose(self, reason: str) -> None:
        with self._encoder.changed:
            self._dispatch.lose(reason)
        self._settle()

    def tick(self, now: float) -> None:
        with self._encoder.changed:
            self._dispatch.tick(now)
        self._settle()

    @property
    def unacknowledged(self) -> bool:
        return bool(self._dispatch.unacked) and self._attached

    def joined(self, link: SenderLink) -> None:
        """``link`` will carry this handoff as soon as it is connected."""
        self._link = link

    def attached(self) -> None:
        """The connection is ready: the peer may know."""
        self._attached = True
        self._send(Begin(self.request_id, self.epoch, self._tokens, self._ticket.codec))
        self._announce()

    def received(self, record: Ack | Complete | Drop) -> None:
        match record:
            case Ack():
                self._encoder.acknowledge(self._feed, record)
                self._wake()
            case Complete():
                with self._encoder.changed:
                    self._dispatch.complete(record)
            case Drop():
                self._leave()
                with self._encoder.changed:
                    self._dispatch.lose(f"decode worker: {record.reason}")
        self._settle()

    def _staged(self, parcel: Parcel) -> None:
        """Called on the encoder's thread; many parcels may share one call of the event loop, and one write."""
        self._unsent.append(parcel)
        if not self._announcing:
            self._announcing = True
            self._post(self._announce)

    def _announce(self) -> None:
        self._announcing = False  # before looking: what is staged from now on is announced by another call
        if self._attached:
            parcels = [self._unsent.popleft() for _ in range(len(self._unsent))]
            self._told += len(parcels)
            self._send(*parcels)
        self._advance()

    def _advance(self) -> None:
        """Commits when everything is staged and announced."""
        if self._attached:
            with self._encoder.changed:
                commit = self._dispatch.commit(self._told)
            if commit is not None:
                self._send(commit)
        self._settle()

    def _wake(self) -> None:
        self._moved.set()

    def _send(self, *records: object) -> None:
        if self._link is not None and self._dispatch.outcome is None:
            self._link.send(*records)

    def _settle(self) -> None:
        """Once there is an outcome: tells the peer, frees the staging, wakes whoever waits."""
        outcome = self._dispatch.outcome
        if outcome is None or self._over.is_set():
            return
        self._over.set()
        if self._link is not None and not isinstance(outcome, Landed):
            self._link.dismiss(Drop(self.request_id, self.epoch, outcome.reason))
        self._leave()
        self._unsent.clear()
        self._encoder.drop(self._feed)
        self._on_over(self)
        self._wake()

    def _leave(self) -> None:
        if self._link is not None:
            self._link.remove(self)
            self._link = None

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        # After the loop is closed nobody waits for this handoff any more; the engine's thread must not fail over it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)
