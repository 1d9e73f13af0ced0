"""The way in: what :mod:`router.admission` decides, applied to the requests and workers of this process.

A request offers its claim, waits until it is told that it is its turn, and reports what it saw. While anybody waits the
line is looked at whenever a request comes, gets its first token or ends, and every ``TICK_S`` besides, since workers
push their loads without being asked. A request that is retried on other workers keeps its turn.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from baton.api_keys import Caller, TenantLimits
from baton.config_admission import AdmissionConfig
from baton.errors import RATE_LIMIT_EXCEEDED, DeadlineExceeded, Overloaded
from router.admission import Admission, Claim, Dropped
from router.limits import Limits, Refusal
from router.peers import Pools
from router.predict import Learner, Outlook, outlook
from router.validate import ParsedRequest

log = logging.getLogger(__name__)

TICK_S = 0.01
FEWEST_GAPS = 4  # of a stream whose pace is believed


@dataclass(slots=True)
class Turn:
    """One request's way through; its owner calls :meth:`Entry.came` for every batch of tokens."""

    claim: Claim
    ready: asyncio.Future[Dropped | None]  # None: it is its turn
    offered_s: float
    promised_s: float = 0.0  # first token, from the offer
    taken_s: float = 0.0
    prompt_s: float = 0.0  # what its prompt is worth, where it waited for nobody
    pace_s: float = 0.0  # promised per later token
    overtaken: bool = False  # by one that came later: then it was not the model that was wrong
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Entry:
    """Everything about admission that one router keeps."""

    config: AdmissionConfig
    pools: Pools
    _admission: Admission = field(init=False)
    _limits: Limits = field(init=False)
    _learner: Learner = field(default_factory=Learner)
    _turns: dict[int, Turn] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _ticker: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        config = self.config
        self._admission = Admission(config.max_waiting, config.aging_s, config.lead_ms / 1e3, config.predict)
        self._limits = Limits(TenantLimits(config.requests_per_minute, config.tokens_per_minute))

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._admission.waiting)

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker], timeout=1.0)

    def look(self, caller: Caller) -> None:
        """As :meth:`charge`, without charging: whoever is over the rate need not even be read."""
        _check(self._limits.refusal(caller.tenant, time.monotonic(), caller.limits))

    def charge(self, caller: Caller) -> None:
        """One more request of ``caller``, of which nothing was looked at yet. Raises :class:`Overloaded`."""
        _check(self._limits.take_request(caller.tenant, time.monotonic(), caller.limits))

    @asynccontextmanager
    async def turn(
        self, parsed: ParsedRequest, caller: Caller, *, arrived_s: float, uncached_tokens: int
    ) -> AsyncIterator[Turn]:
        """Entered when it is the request's turn; leaving tells the others.

        Raises :class:`Overloaded` at once when it is refused, later when it is shed, and :class:`DeadlineExceeded`.
        """
        asked = len(parsed.prompt) + parsed.outputs * parsed.sampling.max_tokens
        _check(self._limits.take_tokens(caller.tenant, asked, time.monotonic(), caller.limits))
        turn = self._offer(_claim(next(self._numbers), parsed, arrived_s, uncached_tokens))
        try:
            await self._wait(turn)
            yield turn
        finally:
            used = len(parsed.prompt) + turn.tokens if turn.taken_s else 0
            self._limits.give_back(caller.tenant, max(0, asked - used), time.monotonic())
            self._leave(turn)

    def came(self, turn: Turn, tokens: int) -> None:
        """So many tokens of the request came just now."""
        now_s = time.monotonic()
        turn.tokens, turn.last_s = turn.tokens + tokens, now_s
        if turn.first_s:
            return
        turn.first_s = now_s
        self._admission.first(turn.claim, now_s)
        if not turn.overtaken:
            self._learner.first_token(turn.promised_s, now_s - turn.offered_s, now_s)
        if turn.prompt_s:
            self._learner.unhindered(turn.prompt_s, now_s - turn.taken_s)
        self._advance()

    # ---- one request

    def _offer(self, claim: Claim) -> Turn:
        now_s, seen = time.monotonic(), self._outlook()
        turn = Turn(claim, asyncio.get_running_loop().create_future(), now_s)
        turn.promised_s = self._admission.ttft_s(claim, seen, now_s)
        self._turns[claim.number] = turn
        dropped = self._admission.offer(claim, seen, now_s)
        for one in dropped:
            self._turns[one.claim.number].overtaken = True  # by this one: no prediction was wrong
        self._drop(dropped)
        self._advance()
        return turn

    async def _wait(self, turn: Turn) -> None:
        try:
            async with asyncio.timeout(turn.claim.deadline_s - time.monotonic()):
                dropped = await turn.ready
        except TimeoutError:
            raise DeadlineExceeded("the request's time was used up in the line", field="budget_ms") from None
        if dropped is not None:
            if time.monotonic() >= turn.claim.deadline_s:
                raise DeadlineExceeded("the request's time was used up before it could begin", field="budget_ms")
            retry_after_ms = math.ceil(1e3 * dropped.retry_after_s)
            raise Overloaded(dropped.message, retry_after_ms=retry_after_ms, reason=dropped.reason)

    def _leave(self, turn: Turn) -> None:
        now_s = time.monotonic()
        self._turns.pop(turn.claim.number, None)
        self._admission.leave(turn.claim)
        if turn.taken_s:
            self._learner.left(now_s - turn.taken_s)
        if turn.claim.sequences == 1 and turn.tokens > FEWEST_GAPS:
            self._learner.pace(turn.pace_s, (turn.last_s - turn.first_s) / (turn.tokens - 1), now_s)
        self._advance()

    # ---- the line

    def _advance(self) -> None:
        """Sends away whoever came too late, and lets in whoever's turn it is."""
        seen, now_s = self._outlook(), time.monotonic()
        self._drop(self._admission.overdue(seen, now_s))
        while (claim := self._admission.take(seen, now_s)) is not None:
            self._take(self._turns[claim.number], seen)
        if self._admission.waiting and (self._ticker is None or self._ticker.done()):
            self._ticker = asyncio.create_task(self._tick(), name="admission")

    async def _tick(self) -> None:
        while self._admission.waiting:
            await asyncio.sleep(TICK_S)
            self._advance()

    def _take(self, turn: Turn, seen: Outlook) -> None:
        turn.taken_s = time.monotonic()
        turn.pace_s = seen.tpot_s(turn.claim.sequences)
        if not seen.backlog_s and self._admission.unanswered == 1 and turn.taken_s - turn.offered_s < TICK_S:
            turn.prompt_s = turn.claim.prompt_tokens * seen.fastest_s
        for waiting in self._admission.waiting:
            if waiting.number < turn.claim.number:
                self._turns[waiting.number].overtaken = True
        self._settle(turn, None)

    def _drop(self, dropped: list[Dropped]) -> None:
        for one in dropped:
            self._settle(self._turns[one.claim.number], one)

    def _settle(self, turn: Turn, outcome: Dropped | None) -> None:
        if turn.ready.done():  # its client left, and its task has not run since
            return
        if outcome is not None and outcome.reason == "shed" and not turn.overtaken:
            self._learner.first_token(turn.promised_s, math.inf, time.monotonic())
        turn.ready.set_result(outcome)

    def _outlook(self) -> Outlook:
        prefills = [peer.view() for peer in self.pools.of("prefill")]
        decodes = [peer.view() for peer in self.pools.of("decode")]
        return outlook(prefills, decodes, self._learner.at(time.monotonic()))


def _check(refusal: Refusal | None) -> None:
    if refusal is not None:
        retry_after_ms = math.ceil(1e3 * refusal.retry_after_s)
        raise Overloaded(refusal.message, retry_after_ms=retry_after_ms, reason=RATE_LIMIT_EXCEEDED)


def _claim(number: int, parsed: ParsedRequest, arrived_s: float, uncached_tokens: int) -> Claim:
    slo = parsed.slo
    return Claim(
        number,
        parsed.slo_class,
        parsed.priority,
        arrived_s,
        arrived_s + parsed.budget_s,
        ttft_s=slo.ttft_ms / 1e3 or math.inf,
        tpot_s=slo.tpot_ms / 1e3 or math.inf,
        prompt_tokens=max(1, uncached_tokens),
        sequences=parsed.outputs,
    )
