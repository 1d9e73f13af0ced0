"""The way in, under simulated time: what :mod:`router.admission` decides, with the router's own predictions.

The twin of ``router.entry``, which waits on an event loop: a claim is offered, waits until it is taken, and reports its
first token and its end. While anybody waits the line is looked at whenever one of these happens, and every ``TICK_S``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.config_admission import AdmissionConfig
from placement.events import Rank, Timeline
from placement.outcome import Trip
from router.admission import Admission, Claim, Dropped
from router.policy import WorkerView
from router.predict import Learner, Outlook, outlook

TICK_S = 0.01  # router.entry.TICK_S
FEWEST_GAPS = 4  # router.entry.FEWEST_GAPS
DEADLINE_S = 600.0  # router.deadline_s: of requests that give none


class Workers(Protocol):
    """Whom requests go to."""

    def seen(self) -> tuple[Sequence[WorkerView], Sequence[WorkerView]]:
        """Prefill and decode workers as the router sees them now."""

    def admitted(self, number: int) -> None:
        """It is this request's turn."""

    def refused(self, number: int) -> None:
        """It will not be served."""


@dataclass(slots=True)
class _Turn:
    claim: Claim
    promised_s: float
    taken_s: float | None = None
    prompt_s: float = 0.0  # what its prompt is worth, where it waited for nobody
    pace_s: float = 0.0  # promised per later token
    overtaken: bool = False  # by one that came later


class Entry:
    """The line of one router. All requests are of the default class."""

    def __init__(self, config: AdmissionConfig, timeline: Timeline, workers: Workers) -> None:
        self._class = config.classes[config.default_class]
        self._name, self._timeline, self._workers = config.default_class, timeline, workers
        self._admission = Admission(config.max_waiting, config.aging_s, config.lead_ms / 1e3, config.predict)
        self._learner = Learner()
        self._turns: dict[int, _Turn] = {}
        self._ticking = False
        self._known: tuple[Sequence[WorkerView], Sequence[WorkerView], Outlook] | None = None

    def offer(self, number: int, *, uncached_tokens: int) -> None:
        """A request came. ``admitted`` or ``refused`` is called for it now or later."""
        now_s, seen, slo = self._timeline.now_s, self._outlook(), self._class
        claim = Claim(
            number, self._name, slo.priority, now_s, now_s + DEADLINE_S,
            ttft_s=slo.ttft_ms / 1e3 or math.inf, tpot_s=slo.tpot_ms / 1e3 or math.inf, prompt_tokens=uncached_tokens,
        )  # fmt: skip
        self._turns[number] = _Turn(claim, self._admission.ttft_s(claim, seen, now_s))
        dropped = self._admission.offer(claim, seen, now_s)
        for one in dropped:
            self._turns[one.claim.number].overtaken = True  # by this one: no prediction was wrong
        self._drop(dropped)
        self._advance(None if dropped else seen)

    def first_token(self, number: int) -> None:
        turn, now_s = self._turns[number], self._timeline.now_s
        self._admission.first(turn.claim, now_s)
        if not turn.overtaken:
            self._learner.first_token(turn.promised_s, now_s - turn.claim.arrived_s, now_s)
        if turn.prompt_s and turn.taken_s is not None:
            self._learner.unhindered(turn.prompt_s, now_s - turn.taken_s)
        self._advance()

    def left(self, number: int, trip: Trip) -> None:
        """It ended, one way or another."""
        turn = self._turns.pop(number, None)
        if turn is None:
            return
        now_s = self._timeline.now_s
        self._admission.leave(turn.claim)
        if turn.taken_s is not None:
            self._learner.left(now_s - turn.taken_s)
        if trip.sent > FEWEST_GAPS:
            self._learner.pace(turn.pace_s, (now_s - trip.first_token_s) / (trip.sent - 1), now_s)
        self._advance()

    # ---- the line

    def _advance(self, seen: Outlook | None = None) -> None:
        """Sends away whoever came too late, and lets in whoever's turn it is. ``seen``: the outlook, if it is known."""
        admission, now_s = self._admission, self._timeline.now_s
        if not admission.waiting:
            return
        seen = seen or self._outlook()
        self._drop(admission.overdue(seen, now_s))
        taken = []
        while (claim := admission.take(seen, now_s)) is not None:
            self._take(self._turns[claim.number], seen)
            taken.append(claim.number)
        if admission.waiting and not self._ticking:
            self._ticking = True
            self._timeline.at(now_s + TICK_S, Rank.NEWS, self._tick)
        for number in taken:  # their dispatch comes back here if it fails
            self._workers.admitted(number)

    def _tick(self) -> None:
        self._ticking = False
        self._advance()

    def _take(self, turn: _Turn, seen: Outlook) -> None:
        now_s, claim = self._timeline.now_s, turn.claim
        turn.taken_s, turn.pace_s = now_s, seen.tpot_s(claim.sequences)
        if not seen.backlog_s and self._admission.unanswered == 1 and now_s - claim.arrived_s < TICK_S:
            turn.prompt_s = claim.prompt_tokens * seen.fastest_s
        for waiting in self._admission.waiting:
            if waiting.number < claim.number:
                self._turns[waiting.number].overtaken = True

    def _drop(self, dropped: Sequence[Dropped]) -> None:
        for one in dropped:
            turn = self._turns.pop(one.claim.number)
            if one.reason == "shed" and not turn.overtaken:
                self._learner.first_token(turn.promised_s, math.inf, self._timeline.now_s)
            self._workers.refused(one.claim.number)

    def _outlook(self) -> Outlook:
        """The same as before while nobody's view and nothing learned has changed."""
        prefills, decodes = self._workers.seen()
        learned, known = self._learner.at(self._timeline.now_s), self._known
        if known is None or known[0] is not prefills or known[1] is not decodes:
            seen = outlook(prefills, decodes, learned)
        else:
            seen = known[2] if known[2].learned == learned else known[2]._replace(learned=learned)
        self._known = prefills, decodes, seen
        return seen
