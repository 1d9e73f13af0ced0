"""One request's way through the workers: reserve, prefill, hand over, decode; every way out frees everything.

    choose decode ─► Reserve ─► Ticket ─► choose prefill ─► Prefill(ticket) ─► first token ─► tokens from decode

Without a prefill pool the decode worker computes the whole sequence: ``Decode``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace

from baton import ledger
from baton.errors import BatonError, DeadlineExceeded, ProtocolError, from_code
from baton.messages import Decode, Failed, Granted, Handed, Prefill, Report, Reserve, Ticket, Tokens
from baton.request import TokenEvent, Work
from router.choice import Choice
from router.peers import Peer, Role


@dataclass(slots=True)
class Run:
    """What the router knows of one request under way. Times are monotonic seconds of this process."""

    work: Work
    codec: str  # or "auto": any that the floor allows
    arrived_s: float
    deadline_s: float
    floor: str = "exact"
    dispatched_s: float = 0.0
    first_token_s: float = 0.0
    first_decode_s: float = 0.0
    last_token_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    transfer_busy_s: float = 0.0
    transfer_bytes: int = 0
    codec_tokens: dict[str, int] = field(default_factory=dict)
    transport: str = ""
    inbox: asyncio.Queue[tuple[Role, object]] = field(default_factory=asyncio.Queue)

    def sink(self, peer: Peer, record: object) -> None:
        self.inbox.put_nowait((peer.address.role, record))  # bounded by max_tokens: one event per token at most

    def remaining(self) -> Work:
        """The work with the time that is left now."""
        return replace(self.work, budget_s=max(0.0, self.deadline_s - time.monotonic()))

    async def next(self) -> tuple[Role, object]:
        """The next record from any worker. Raises :class:`DeadlineExceeded`."""
        try:
            async with asyncio.timeout(self.deadline_s - time.monotonic()):
                return await self.inbox.get()
        except TimeoutError:
            raise DeadlineExceeded("the request's time is used up", field="budget_ms") from None

    def account(self, report: Report) -> None:
        self.stages.update(report.stages)
        self.transfer_busy_s += report.transfer_busy_s
        self.transfer_bytes += report.transfer_bytes
        self.codec_tokens.update(report.codec_tokens)

    def arrived(self, role: Role) -> None:
        """Tokens came from a worker of ``role``."""
        self.last_token_s = now_s = time.monotonic()
        self.first_token_s = self.first_token_s or now_s
        if role == "decode":
            self.first_decode_s = self.first_decode_s or now_s

    def ledger(self) -> ledger.Ledger:
        """The stages so far, summing to the time from arrival to the last token."""
        total_s = max(0.0, self.last_token_s - self.arrived_s)
        measured = self.stages | {"admit": max(0.0, self.dispatched_s - self.arrived_s)}
        if self.first_decode_s:
            measured["decode"] = measured.get("decode", 0.0) + self.last_token_s - self.first_decode_s
        return ledger.Ledger(
            total_s=total_s,
            stages=ledger.close(total_s, measured),
            transfer_busy_s=self.transfer_busy_s,
            transfer_bytes=self.transfer_bytes,
            codec=ledger.blend(self.codec_tokens),
            transport=self.transport,
        )


class InOrder:
    """Merges two workers' tokens by index: each travels its own connection, so the second may overtake the first."""

    def __init__(self) -> None:
        self._due: dict[int, TokenEvent] = {}
        self._next = 0

    def push(self, events: Iterable[TokenEvent]) -> tuple[TokenEvent, ...]:
        """Every token that is now due, in order."""
        self._due.update((event.index, event) for event in events)
        batch = []
        while self._next in self._due:
            batch.append(self._due.pop(self._next))
            self._next += 1
        return tuple(batch)


class Dispatcher:
    """Runs requests over the connected workers."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    async def stream(self, run: Run) -> AsyncGenerator[tuple[TokenEvent, ...]]:
        """Every output token, in order, in batches as they come. Closing the iterator frees the request everywhere."""
        work, request_id = run.work, run.work.request_id
        with contextlib.ExitStack() as held:
            decode = self._choice.decode(work)
            local = self._choice.local(work, decode)
            held.enter_context(decode.attached(request_id, run.sink, len(work.prompt), computes=local))
            if local:
                decode.send(Decode(run.remaining()))
            else:
                decode.send(Reserve(run.remaining(), epoch=0, codec=run.codec, floor=run.floor))
                ticket = await self._granted(run)
                prefill = self._choice.prefill(work)
                held.enter_context(prefill.attached(request_id, run.sink, len(work.prompt), computes=True))
                prefill.send(Prefill(run.remaining(), ticket))
                run.transport = ticket.transport
            run.dispatched_s = time.monotonic()
            async with contextlib.aclosing(self._tokens(run)) as batches:
                async for batch in batches:
                    yield batch

    async def _granted(self, run: Run) -> Ticket:
        match await run.next():
            case _, Granted(ticket=ticket):
                return ticket
            case _, Failed() as failed:
                raise _error(failed)
            case role, other:
                raise ProtocolError(f"{type(other).__name__} from {role} before the ticket")

    async def _tokens(self, run: Run) -> AsyncGenerator[tuple[TokenEvent, ...]]:
        """Both workers' tokens in order, until the last."""
        merge = InOrder()
        while True:
            match await run.next():
                case role, Tokens(events=events):
                    run.arrived(role)
                    if batch := merge.push(events):
                        yield batch
                        if batch[-1].finish:
                            return
                case _, Report() as report:
                    run.account(report)
                case role, Failed() as failed:
                    # After the first token prefill's part is over; whether the handoff worked is decode's to say.
                    if role == "decode" or not run.first_token_s:
                        raise _error(failed)
                case _, Handed():
                    pass
                case role, other:
                    raise ProtocolError(f"unexpected {type(other).__name__} from {role}")


def _error(failed: Failed) -> BatonError:
    return from_code(failed.code, failed.message, field=failed.field, retry_after_ms=failed.retry_after_ms)
