"""What a request would see if it came now: seconds to its first token, and per token after that. Pure.

    TTFT = factor · (until a prompt can begin + its uncached tokens · seconds per token + what every first token costs)
    TPOT = factor · (step + sequence · sequences in the batch)

A prompt begins when the prompts before it are computed, at the router and at the workers, and when the decode batch has
a seat for it: a batch has as many seats as keep TPOT. Seconds per token, step and sequence are measured in the workers
and pushed with their load; how long a seat is kept, what every first token costs and both factors are learned here from
what was seen (docs/adr/0015). While nothing was measured there is nothing to predict: 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.policy import WorkerView

KEPT = 0.95  # share of predictions that shall hold
STEP = 0.1  # by how much a broken prediction moves a factor, in its logarithm; a kept one by a nineteenth
MOST = 4.0  # bound of a factor, and its inverse
FADE_S = 60.0  # without observations a factor is halfway back to 1 after so long
SMOOTH = 0.1  # weight of the newest in a mean
MOST_FIRST_S = 2.0  # what one outlier may claim that every first token costs


class Factor:
    """What predictions are multiplied by so that :data:`KEPT` of them hold: a quantile followed step by step.

    A prediction that did not hold raises it, one that held lowers it less; the two balance where the share is right.
    It is bounded and fades, so that no wrong model, nor one bad minute, refuses everything or nothing for ever.
    """

    def __init__(self) -> None:
        self._log, self._since_s = 0.0, 0.0

    def at(self, now_s: float) -> float:
        return math.exp(self._log * 0.5 ** (max(0.0, now_s - self._since_s) / FADE_S))

    def observe(self, promised_s: float, seen_s: float, now_s: float) -> None:
        """``promised_s`` was predicted, with this factor in it, and ``seen_s`` came."""
        log = math.log(self.at(now_s)) + (STEP if seen_s > promised_s else -STEP * (1.0 - KEPT) / KEPT)
        self._log, self._since_s = min(max(log, -math.log(MOST)), math.log(MOST)), now_s


class Mean:
    """Of what was seen lately; 0 before the first."""

    def __init__(self) -> None:
        self.value = 0.0
        self._seen = False

    def observe(self, value: float) -> None:
        self.value = self.value + SMOOTH * (value - self.value) if self._seen else value
        self._seen = True


class Learned(NamedTuple):
    """What the router itself has seen lately."""

    ttft_factor: float = 1.0
    tpot_factor: float = 1.0
    first_s: float = 0.0  # of a first token that had to wait for nothing, beyond its prompt's computation
    seat_s: float = 0.0  # how long a sequence keeps its seat; 0: unknown


class Learner:
    """Gathers what requests saw."""

    def __init__(self) -> None:
        self._ttft, self._tpot = Factor(), Factor()
        self._first, self._seat = Mean(), Mean()

    def at(self, now_s: float) -> Learned:
        return Learned(self._ttft.at(now_s), self._tpot.at(now_s), self._first.value, self._seat.value)

    def first_token(self, promised_s: float, seen_s: float, now_s: float) -> None:
        if promised_s > 0.0:
            self._ttft.observe(promised_s, seen_s, now_s)

    def unhindered(self, prompt_s: float, seen_s: float) -> None:
        """A first token that waited for nobody came after ``seen_s``; its prompt alone was worth ``prompt_s``."""
        self._first.observe(min(max(0.0, seen_s - prompt_s), MOST_FIRST_S))

    def pace(self, promised_s: float, seen_s: float, now_s: float) -> None:
        if promised_s > 0.0:
            self._tpot.observe(promised_s, seen_s, now_s)

    def left(self, seat_s: float) -> None:
        """A sequence gave its seat back after so long."""
        self._seat.observe(seat_s)


class Outlook(NamedTuple):
    """The workers as one: a pool that computes prompts one after the other, and seats in decode batches.

    ``own_*``: what this router has sent, or is about to, whether or not workers have told of it yet.
    """

    decodes: tuple[WorkerView, ...]
    token_s: float = 0.0  # per prompt token of all workers together; 0 while one of them has measured nothing
    fastest_s: float = 0.0  # per prompt token of the fastest
    pushed_s: float = 0.0  # until the first of the workers is through with the prompts that it has
    busy: bool = False  # somebody has something to do
    learned: Learned = Learned()
    own_tokens: int = 0  # of prompts without a first token yet
    own_sequences: int = 0
    progress_s: float = 0.0  # for so long somebody must have been computing the oldest of them
    stalled_s: float = 0.0  # for so long no first token has come that should have

    @property
    def idle(self) -> bool:
        """Nothing is under way: one more can only be a gain, whatever is predicted."""
        return not (self.busy or self.own_sequences)

    @property
    def backlog_s(self) -> float:
        """Until a worker has time for another prompt. A stall is expected to go on for as long as it has lasted."""
        ahead_s = max(self.pushed_s, self.own_tokens * self.token_s)
        return max(0.0, ahead_s - self.progress_s) + self.stalled_s

    def tpot_s(self, more: int) -> float:
        """Of the best batch with ``more`` sequences in it; 0 while no step was measured."""
        steps = [view.load.step_s + view.load.sequence_s * (view.sequences + more) for view in self.decodes]
        return self.learned.tpot_factor * min(steps, default=0.0)

    @property
    def tpot_alone_s(self) -> float:
        """Of a sequence that has the best worker's batch to itself; 0 while no step was measured."""
        steps = [view.load.step_s + view.load.sequence_s for view in self.decodes]
        return self.learned.tpot_factor * min(steps, default=0.0)

    def seats(self, limit_s: float) -> tuple[float, float]:
        """Seats in batches whose TPOT stays within ``limit_s``: those free, and all. inf where nothing limits them.

        Fewer than none are free in a batch that is too large already. A batch of one is always allowed.
        """
        if not self.decodes:
            return math.inf, math.inf
        total = sum(self._room(view, limit_s) for view in self.decodes)
        return total - max(self.own_sequences, sum(view.sequences for view in self.decodes)), total

    def _room(self, view: WorkerView, limit_s: float) -> float:
        """Sequences that this worker can decode together: by time, and by pages if they stay as long as they are."""
        load = view.load
        spare_s = limit_s / self.learned.tpot_factor - load.step_s
        by_time = spare_s / load.sequence_s if load.sequence_s else math.copysign(math.inf, spare_s)
        by_pages = load.pages_total * view.sequences / load.pages_used if load.pages_used else math.inf
        room = min(by_time, by_pages)
        return max(1.0, float(math.floor(room))) if abs(room) < math.inf else max(1.0, room)


@dataclass(slots=True)
class Timeline:
    """Places claims one behind the other."""

    outlook: Outlook
    tokens: int = 0  # of those placed so far
    sequences: int = 0
    _seats: dict[float, tuple[float, float]] = field(default_factory=dict)  # by limit

    def first_token_s(self, tokens: int, sequences: int, limit_s: float) -> float:
        """TTFT, from now, of the next one: ``tokens`` to compute and TPOT at most ``limit_s``. 0: nothing is known."""
        outlook, learned = self.outlook, self.outlook.learned
        if not outlook.token_s:
            return 0.0
        start_s = max(outlook.backlog_s + self.tokens * outlook.token_s, self.seat_s(sequences, limit_s))
        return learned.ttft_factor * (start_s + tokens * outlook.fastest_s + learned.first_s)

    def seat_s(self, sequences: int, limit_s: float) -> float:
        """Until the next one has its seats; 0 where there are enough, or nobody knows how long they are kept."""
        free, total = self.seats(limit_s)
        short = self.sequences + min(sequences, total) - free
        return short * self.outlook.learned.seat_s / total if 0.0 < short < math.inf else 0.0

    def seats(self, limit_s: float) -> tuple[float, float]:
        """As :meth:`Outlook.seats`."""
        if limit_s not in self._seats:
            self._seats[limit_s] = self.outlook.seats(limit_s)
        return self._seats[limit_s]

    def place(self, tokens: int, sequences: int) -> None:
        self.tokens, self.sequences = self.tokens + tokens, self.sequences + sequences


def outlook(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], learned: Learned) -> Outlook:
    """What workers said last. Without a prefill pool decode workers compute the prompts."""
    prompts = prefills or decodes
    speeds = [view.load.prompt_token_s for view in prompts]
    known = bool(speeds) and all(speeds)
    return Outlook(
        decodes=tuple(decodes),
        token_s=1.0 / sum(1.0 / token_s for token_s in speeds) if known else 0.0,
        fastest_s=min(speeds) if known else 0.0,
        pushed_s=min((view.queued_tokens * view.load.prompt_token_s for view in prompts), default=0.0),
        busy=any(view.queued_tokens for view in prompts) or any(view.sequences for view in decodes),
        learned=learned,
    )
