"""What the router knows of one request under way, over all attempts to serve it, and of the attempt that runs now."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from baton import ledger
from baton.errors import BatonError, DeadlineExceeded
from baton.messages import Report, Tokens
from baton.request import TokenEvent, Work
from router.peers import Peer, Role

BEHIND = 3  # records that wait behind one: a tenth of a second late where a token comes every 33 ms


@dataclass(slots=True)
class Run:
    """One request. Times are monotonic seconds of this process."""

    work: Work
    codec: str  # or "auto": any that the floor allows
    arrived_s: float
    deadline_s: float
    floor: str = "exact"
    sent: list[int] = field(default_factory=list)  # output tokens that the client has
    attempts: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    transfer_busy_s: float = 0.0
    transfer_bytes: int = 0
    codec_tokens: dict[str, int] = field(default_factory=dict)
    transport: str = ""
    carrier: str = ""  # what moved the bytes, as the transport itself says
    tries: list[Attempt] = field(default_factory=list)

    def attempt(self) -> Attempt:
        """The next try. Workers know it by an id of its own, so that nothing of an earlier one is taken for it."""
        request_id = f"{self.work.request_id}.{self.attempts}" if self.attempts else self.work.request_id
        work = replace(self.work, request_id=request_id, output=tuple(self.sent))
        self.attempts += 1
        if self.attempts == 1:
            self._add({"admit": time.monotonic() - self.arrived_s})
        attempt = Attempt(work, self.deadline_s, epoch=self.attempts - 1, merge=InOrder(len(self.sent)))
        self.tries.append(attempt)
        return attempt

    def took(self, attempt: Attempt, batch: tuple[TokenEvent, ...]) -> None:
        """``batch`` goes to the client now."""
        self.sent += [event.token for event in batch]
        self.last_token_s = attempt.last_token_s
        self.first_token_s = self.first_token_s or attempt.last_token_s

    def ended(self, attempt: Attempt) -> None:
        """Adds what ``attempt`` was good for."""
        self.transfer_busy_s += attempt.report.transfer_busy_s
        self.transfer_bytes += attempt.report.transfer_bytes
        for codec, tokens in attempt.report.codec_tokens.items():
            self.codec_tokens[codec] = self.codec_tokens.get(codec, 0) + tokens
        self.transport = attempt.transport or self.transport
        self.carrier = attempt.report.carrier or self.carrier
        if attempt.fruitful:
            self._add(attempt.report.stages)
            self._add({"admit": attempt.dispatched_s - attempt.begun_s, "decode": attempt.decoded_s})

    def lost(self, attempt: Attempt, pause_s: float) -> None:
        """``attempt`` failed, and the next one begins after ``pause_s``: what the client waited for nothing."""
        self._add({"recover": time.monotonic() - (attempt.last_token_s or attempt.begun_s) + pause_s})

    def ledger(self) -> ledger.Ledger:
        """The stages so far, summing to the time from arrival to the last token."""
        total_s = max(0.0, self.last_token_s - self.arrived_s)
        return ledger.Ledger(
            total_s=total_s,
            stages=ledger.close(total_s, self.stages),
            transfer_busy_s=self.transfer_busy_s,
            transfer_bytes=self.transfer_bytes,
            codec=ledger.blend(self.codec_tokens),
            transport=self.transport,
        )

    def _add(self, stages: dict[str, float]) -> None:
        for stage, seconds in stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


class InOrder:
    """Merges two workers' tokens by index: each travels its own connection, so the second may overtake the first."""

    def __init__(self, due: int = 0) -> None:
        """``due``: index of the first one."""
        self._due: dict[int, TokenEvent] = {}
        self._next = due

    def push(self, events: tuple[TokenEvent, ...]) -> tuple[TokenEvent, ...]:
        """Every token that is now due, in order."""
        if not self._due and all(event.index == at for at, event in enumerate(events, self._next)):
            self._next += len(events)  # nearly always
            return events
        batch = []
        self._due.update((event.index, event) for event in events)
        while self._next in self._due:
            batch.append(self._due.pop(self._next))
            self._next += 1
        return tuple(batch)


class Inbox:
    """What workers say of one attempt, for its one reader. None: the time is up.

    Bounded by the request: at most ``max_tokens`` events, and a few records besides.
    """

    __slots__ = ("_records", "_waiter")

    def __init__(self) -> None:
        self._records: deque[tuple[Peer, object] | None] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, record: tuple[Peer, object] | None) -> None:
        self._records.append(record)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[Peer, object] | None:
        """The next one, as soon as there is one. Where this process or its client cannot keep up, those of a worker's
        tokens that wait are one record: the client gets them in one message, at the cost of one."""
        if not self._records:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        first = self._records.popleft()
        if len(self._records) < BEHIND or first is None or not isinstance(first[1], Tokens):
            return first
        peer, events = first[0], list(first[1].events)
        while self._records and (more := self._records[0]) is not None and more[0] is peer:
            if not isinstance(more[1], Tokens):
                break
            events += more[1].events
            self._records.popleft()
        return peer, Tokens(tuple(events))


@dataclass(slots=True)
class Attempt:
    """One try to serve a request: over one decode worker, and one prefill worker unless that computes the prompt."""

    work: Work
    deadline_s: float
    epoch: int
    merge: InOrder
    begun_s: float = field(default_factory=time.monotonic)
    dispatched_s: float = 0.0
    first_decode_s: float = 0.0
    last_token_s: float = 0.0  # when the last tokens that the client got came
    finished: bool = False
    transport: str = ""
    report: Report = field(default_factory=lambda: Report("", {}))
    peers: dict[str, Peer] = field(default_factory=dict)  # that have a part in it, by worker id
    by_role: dict[Role, str] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()  # of them, those that said so or fell silent
    inbox: Inbox = field(default_factory=Inbox)

    @property
    def fruitful(self) -> bool:
        """It brought the client tokens."""
        return self.last_token_s > 0.0

    @property
    def progressed(self) -> bool:
        """The decode worker had a part in that: over and over, the first token alone leads nowhere."""
        return self.first_decode_s > 0.0

    @property
    def decoded_s(self) -> float:
        """From the decode worker's first token to the last one."""
        return self.last_token_s - self.first_decode_s if self.first_decode_s else 0.0

    @contextlib.contextmanager
    def at(self, peer: Peer, *, computes: int) -> Iterator[None]:
        """While open, what ``peer``, which computes so many tokens, says of this attempt comes to the inbox."""
        self.peers[peer.address.worker_id] = peer
        self.by_role[peer.address.role] = peer.address.worker_id
        with peer.attached(self.work.request_id, self._sink, len(self.work.known), computes=computes):
            yield

    def blame(self, error: BatonError) -> str:
        """The reason of ``error`` for the books: its own, as "decode_silent"; else whose part it was, and the code."""
        if error.reason:
            return error.reason
        roles = [role for role, worker in self.by_role.items() if worker in self.failed]
        return f"{roles[0] if roles else 'nobody'}_{error.code.lower()}"

    def remaining(self) -> Work:
        """The work with the time that is left now."""
        return replace(self.work, budget_s=max(0.0, self.deadline_s - time.monotonic()))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """While open, the deadline ends the wait in :meth:`next`: one timer for all the tokens."""
        left_s = self.deadline_s - time.monotonic()
        timer = asyncio.get_running_loop().call_later(left_s, self.inbox.put, None)
        try:
            yield
        finally:
            timer.cancel()

    async def next(self) -> tuple[Peer, object]:
        """The next record from any worker, inside :meth:`timed`. Raises :class:`DeadlineExceeded`."""
        received = await self.inbox.get()
        if received is None:
            raise DeadlineExceeded("the request's time is used up", field="budget_ms")
        return received

    def arrived(self, role: Role, events: tuple[TokenEvent, ...]) -> tuple[TokenEvent, ...]:
        """Tokens came from a worker of ``role``: all that are due now."""
        batch = self.merge.push(events)
        if batch:
            self.last_token_s = now_s = time.monotonic()
            self.finished = bool(batch[-1].finish)
            if role == "decode":
                self.first_decode_s = self.first_decode_s or now_s
        return batch

    def account(self, peer: Peer, report: Report) -> None:
        """The two workers' reports name different stages."""
        if report.transfer_bytes:
            exposed_s = sum(report.stages.get(stage, 0.0) for stage in ("encode", "wire", "land"))
            peer.handoffs.observe(len(self.work.known), exposed_s)
        mine = self.report
        self.report = Report(
            report.request_id,
            mine.stages | report.stages,
            mine.transfer_busy_s + report.transfer_busy_s,
            mine.transfer_bytes + report.transfer_bytes,
            mine.codec_tokens | report.codec_tokens,
            mine.carrier or report.carrier,
        )

    def _sink(self, peer: Peer, record: object) -> None:
        self.inbox.put((peer, record))
