"""Who is let in, whose turn is next, and who is sent away when it gets too late for him. Pure: the time is an argument.

    offer ──► waiting, by rank ──take──► under way ──first──► streams ──leave──► gone
      └► refused           └─overdue──► shed

Admitted requests wait at the router, since only what has not begun can still be reordered or refused cheaply; workers
get just enough to stay busy. The line's order is that of deadlines (of the objective for the first token), in which
each level of priority counts ``aging_s`` seconds. So whoever waits moves forward against all who come later, and the
order of two requests never changes. The line is bounded; where it is full, a newcomer takes the place of a lower
priority, or is refused.

Before a request is let in, its place and everybody's start are worked out (``router.predict``). Whoever would then be
late for his objective costs somebody his place: whoever has the lowest priority among those before him and himself, of
these the newcomer, then the one with the least time left (Moore's algorithm for the fewest late jobs, with classes).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from router.predict import Outlook, Timeline

PATIENCE_S = 60.0  # a first token that nobody set an objective for is due then, as far as the order is concerned
MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0

Reason = Literal["ttft", "tpot", "deadline", "line_full", "shed"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What one request asks of the workers. Times are monotonic seconds of this process; inf: no objective."""

    number: int  # in order of arrival
    slo_class: str
    priority: int
    arrived_s: float
    deadline_s: float
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    prompt_tokens: int = 1  # to be computed
    sequences: int = 1

    @property
    def due_s(self) -> float:
        """When the first token must be there."""
        return min(self.arrived_s + self.ttft_s, self.deadline_s)

    def rank(self, aging_s: float) -> tuple[float, int]:
        return min(self.due_s, self.arrived_s + PATIENCE_S) - self.priority * aging_s, self.number


@dataclass(frozen=True, slots=True)
class Dropped:
    """A claim that will not be served, why, and when it might be."""

    claim: Claim
    reason: Reason
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class _Sent:
    """A claim that workers have, and when its first token should come."""

    claim: Claim
    sent_s: float
    expected_s: float


@dataclass(slots=True)
class Admission:
    """The requests of one router. ``predict``: whether objectives are promised, or only the line's bound refuses."""

    max_waiting: int
    aging_s: float
    lead_s: float
    predict: bool = True
    waiting: list[Claim] = field(default_factory=list)  # by rank
    _begun: dict[int, Claim] = field(default_factory=dict)  # sent to workers; by number
    _begun_sequences: int = 0
    _promised: Counter[float] = field(default_factory=Counter)  # TPOTs of those, each so often
    _unanswered: dict[int, _Sent] = field(default_factory=dict)  # of these, without a first token yet; oldest first
    _answered_s: float = -math.inf  # when the last first token came
    _last_seen: tuple[Outlook, float, Outlook] | None = None  # what _seen said of which outlook and when

    # ---- the life of a claim

    def offer(self, claim: Claim, outlook: Outlook, now_s: float) -> list[Dropped]:
        """Lets ``claim`` into the line, or drops it at once; others that it displaces are dropped too."""
        lower = [one for one in self.waiting if one.priority < claim.priority]
        if len(self.waiting) >= self.max_waiting and not lower:
            message = f"{len(self.waiting)} requests are waiting already"
            return [Dropped(claim, "line_full", message, _retry_s(self._drain_s(outlook, now_s)))]
        line = list(self.waiting)
        line.insert(self._place(claim), claim)
        seen = self._seen(outlook, now_s)
        trusted = self.predict and bool(self.waiting or not seen.idle)
        if trusted and (alone_s := seen.tpot_alone_s) > claim.tpot_s:
            message = (
                f"a token is expected every {_ms(alone_s)}, class {claim.slo_class!r} promises {_ms(claim.tpot_s)}"
            )
            return [Dropped(claim, "tpot", message, _retry_s(self._drain_s(outlook, now_s)))]
        victims = self._displaced(line, seen, now_s, claim) if trusted else []
        if len(line) - len(victims) > self.max_waiting:  # somebody below goes; of the lowest, who would come last
            victims = [max(lower, key=lambda one: (-one.priority, self._rank(one)))]
        dropped = [
            self._refusal(one, outlook, now_s) if one is claim else self._shed(one, outlook, now_s) for one in victims
        ]
        self.waiting = _without(line, victims)
        return dropped

    def overdue(self, outlook: Outlook, now_s: float) -> list[Dropped]:
        """Those that wait for what will not come in time even if all goes as well as it did on average.

        While nothing is under way nobody is: the next one is about to be taken, and nothing is lost by trying.
        """
        if not self.predict or not self.waiting or self._seen(outlook, now_s).idle:
            return []
        learned = outlook.learned._replace(ttft_factor=min(1.0, outlook.learned.ttft_factor))
        victims = self._late(self.waiting, self._seen(outlook._replace(learned=learned), now_s), now_s)
        self.waiting = _without(self.waiting, victims)
        return [self._shed(claim, outlook, now_s) for claim in victims]

    def take(self, outlook: Outlook, now_s: float) -> Claim | None:
        """The next one to go to the workers; None while they have enough to do, or nobody waits."""
        if not self.waiting:
            return None
        outlook, claim = self._seen(outlook, now_s), self.waiting[0]
        line = Timeline(outlook)
        if not outlook.idle:
            if outlook.backlog_s > self.lead_s:
                return None
            free, total = line.seats(self._limit_s(claim))
            if free < min(claim.sequences, total):
                return None
        self._begun[claim.number] = self.waiting.pop(0)
        self._begun_sequences += claim.sequences
        self._promised[claim.tpot_s] += 1
        expected_s = line.first_token_s(claim.prompt_tokens, claim.sequences, math.inf)
        self._unanswered[claim.number] = _Sent(claim, now_s, now_s + (expected_s or math.inf))
        self._last_seen = None
        return claim

    @property
    def unanswered(self) -> int:
        """Requests that were sent to workers and have no token yet."""
        return len(self._unanswered)

    def first(self, claim: Claim, now_s: float) -> None:
        """Its first token is there."""
        self._unanswered.pop(claim.number, None)
        self._answered_s = now_s
        self._last_seen = None

    def leave(self, claim: Claim) -> None:
        """It ended, or its client left; wherever it was."""
        if self._begun.pop(claim.number, None) is not None:
            self._begun_sequences -= claim.sequences
            self._promised[claim.tpot_s] -= 1
            if not self._promised[claim.tpot_s]:
                del self._promised[claim.tpot_s]
        else:
            self.waiting = _without(self.waiting, [claim])
        self._unanswered.pop(claim.number, None)
        self._last_seen = None

    # ---- predictions

    def ttft_s(self, claim: Claim, outlook: Outlook, now_s: float) -> float:
        """Of one that waits, or would; from now. 0 while nothing was measured."""
        line = Timeline(self._seen(outlook, now_s))
        for one in self.waiting[: self._place(claim)]:
            line.place(one.prompt_tokens, one.sequences)
        return line.first_token_s(claim.prompt_tokens, claim.sequences, self._limit_s(claim))

    def _displaced(self, line: Sequence[Claim], outlook: Outlook, now_s: float, newcomer: Claim) -> list[Claim]:
        """Whoever loses his place because of ``newcomer``, who may be it. Who was late before stays aside: whether to
        send him away is not decided with newcomers' caution."""
        late_before = self._late(self.waiting, outlook, now_s)
        return self._late(_without(line, late_before), outlook, now_s, newcomer)

    def _late(
        self, line: Sequence[Claim], outlook: Outlook, now_s: float, newcomer: Claim | None = None
    ) -> list[Claim]:
        """Whoever loses his place so that all others are in time; see the top."""
        times, kept, victims = Timeline(outlook), list[Claim](), list[Claim]()
        strictest_s = self._strictest_s
        for claim in line:
            kept.append(claim)
            lost: Claim | None = None
            while lost is not claim and self._is_late(claim, times, strictest_s, now_s):
                lower = (one for one in kept if one.priority <= claim.priority)
                lost = min(lower, key=lambda one: (one.priority, one is not newcomer, one.due_s, one.number))
                kept.remove(lost)
                victims.append(lost)
                if lost is not claim:
                    times.place(-lost.prompt_tokens, -lost.sequences)
            if lost is not claim:
                times.place(claim.prompt_tokens, claim.sequences)
        return victims

    def _is_late(self, claim: Claim, times: Timeline, strictest_s: float, now_s: float) -> bool:
        limit_s = min(claim.tpot_s, strictest_s)
        return now_s + times.first_token_s(claim.prompt_tokens, claim.sequences, limit_s) > claim.due_s

    def _seen(self, outlook: Outlook, now_s: float) -> Outlook:
        """``outlook`` with what was sent from here, what became of it since, and for how long nothing has come back."""
        if (last := self._last_seen) is not None and last[0] is outlook and last[1] == now_s:
            return last[2]
        sent = list(self._unanswered.values())
        progress_s = stalled_s = 0.0
        if sent:
            oldest = sent[0]
            since_s = max(0.0, now_s - max(self._answered_s, oldest.sent_s))
            progress_s = min(since_s, oldest.claim.prompt_tokens * outlook.token_s)
            stalled_s = max(0.0, now_s - max(self._answered_s, min([one.expected_s for one in sent])))
        seen = outlook._replace(
            own_tokens=sum([one.claim.prompt_tokens for one in sent]),
            own_sequences=self._begun_sequences,
            progress_s=progress_s,
            stalled_s=stalled_s,
        )
        self._last_seen = outlook, now_s, seen
        return seen

    @property
    def _strictest_s(self) -> float:
        """The shortest TPOT that anybody under way was promised."""
        return min(self._promised, default=math.inf)

    def _limit_s(self, claim: Claim) -> float:
        return min(claim.tpot_s, self._strictest_s)

    def _rank(self, claim: Claim) -> tuple[float, int]:
        return claim.rank(self.aging_s)

    def _place(self, claim: Claim) -> int:
        return bisect_left(self.waiting, self._rank(claim), key=self._rank)

    # ---- refusals

    def _refusal(self, claim: Claim, outlook: Outlook, now_s: float) -> Dropped:
        """Why the newcomer cannot be served in time, or not without making others late. What comes too late by so many
        seconds is worth another try when as much of the backlog is gone."""
        seen_s, left_s = self.ttft_s(claim, outlook, now_s), claim.due_s - now_s
        seat_s = Timeline(self._seen(outlook, now_s)).seat_s(claim.sequences, self._limit_s(claim))
        named, retry_s = f"class {claim.slo_class!r}", _retry_s(seen_s - left_s)
        expected = f"the first token is expected in {_ms(seen_s)}"
        if seen_s <= left_s:
            message = f"to serve {named} in time would make another request late"
            return Dropped(claim, "ttft", message, _retry_s(self._drain_s(outlook, now_s)))
        if claim.deadline_s < claim.arrived_s + claim.ttft_s:
            return Dropped(claim, "deadline", f"{expected}, the deadline is in {_ms(left_s)}", retry_s)
        if seat_s > left_s:
            message = f"the batch has no place before {_ms(seat_s)} that keeps {named} and the others"
            return Dropped(claim, "tpot", message, retry_s)
        return Dropped(claim, "ttft", f"{expected}, {named} promises {_ms(claim.ttft_s)}", retry_s)

    def _shed(self, claim: Claim, outlook: Outlook, now_s: float) -> Dropped:
        message = f"waited {_ms(now_s - claim.arrived_s)}; class {claim.slo_class!r} cannot be kept any more"
        return Dropped(claim, "shed", message, _retry_s(self._drain_s(outlook, now_s)))

    def _drain_s(self, outlook: Outlook, now_s: float) -> float:
        """Until the line of now is gone."""
        line = Timeline(self._seen(outlook, now_s))
        for claim in self.waiting:
            line.place(claim.prompt_tokens, claim.sequences)
        return line.first_token_s(0, 1, self._strictest_s)


def _without(line: Sequence[Claim], gone: Sequence[Claim]) -> list[Claim]:
    numbers = {claim.number for claim in gone}
    return [claim for claim in line if claim.number not in numbers]


def _retry_s(drain_s: float) -> float:
    return min(max(MIN_RETRY_S, drain_s), MAX_RETRY_S)


def _ms(seconds: float) -> str:
    return f"{max(0.0, seconds) * 1e3:.0f} ms"
