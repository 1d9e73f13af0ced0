"""What became of the requests of one simulation, against service-level objectives.

TTFT counts from a request's arrival to its first token. TPOT is the mean gap between its tokens, first to last. A
request attains its SLO when it meets both; one that was refused or lost attains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in seconds, and the share of requests that must meet them."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not (getattr(self, name) > 0):
                raise ConfigError(f"must be positive, is {getattr(self, name)}", field=f"slo.{name}")
        if not 0 < self.attainment <= 1:
            raise ConfigError(f"must lie in (0, 1], is {self.attainment}", field="slo.attainment")


class End(Enum):
    """How a request left the system; PENDING when the simulation was stopped before."""

    PENDING = "pending"
    FINISHED = "finished"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(slots=True)
class Trip:
    """One request's times. ``sent`` counts tokens that the client has."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    queue_s: float = 0.0  # from dispatch to the first step
    handoff_s: float = 0.0  # from the first token to the KV's landing
    sent: int = 0
    attempts: int = 0
    end: End = End.PENDING

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """0 for a request of one token: it has no gap to miss."""
        gaps = self.output_tokens - 1
        return (self.last_token_s - self.first_token_s) / gaps if gaps > 0 else 0.0

    def meets(self, slo: Slo) -> bool:
        return self.end is End.FINISHED and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of all requests: both targets met by the same request, and each one alone."""

    joint: float
    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What one worker did: seconds in steps, steps, and the most KV pages it held, of how many.

    ``hit_tokens`` of the ``entered_tokens`` whose sequences got their pages were in its prefix cache.
    """

    busy_s: float
    steps: int
    pages_high_water: int
    pages_total: int
    preemptions: int
    entered_tokens: int = 0
    hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A simulation's result. ``finished_s`` is when the last event happened."""

    trips: Sequence[Trip]
    finished_s: float
    workers: Mapping[str, WorkerUse]
    gave_up: bool = False  # stopped early: more requests had missed than the SLO allows

    def attainment(self, slo: Slo) -> Attainment:
        total = max(1, len(self.trips))
        done = [trip for trip in self.trips if trip.end is End.FINISHED]
        return Attainment(
            joint=sum(trip.meets(slo) for trip in done) / total,
            ttft=sum(trip.ttft_s <= slo.ttft_s for trip in done) / total,
            tpot=sum(trip.tpot_s <= slo.tpot_s for trip in done) / total,
        )

    def percentiles(self, share: float) -> tuple[float, float]:
        """The ``share`` quantiles of TTFT and TPOT over finished requests, in seconds; NaN when there is none."""
        done = [trip for trip in self.trips if trip.end is End.FINISHED]
        if not done:
            return math.nan, math.nan
        gaps = [trip.tpot_s for trip in done if trip.output_tokens > 1] or [0.0]
        return float(np.quantile([trip.ttft_s for trip in done], share)), float(np.quantile(gaps, share))

    def utilization(self, role: str) -> float:
        """Mean share of the simulated time that the workers whose name starts with ``role`` spent in steps."""
        shares = [use.busy_s / self.finished_s for name, use in self.workers.items() if name.startswith(role)]
        return sum(shares) / len(shares) if shares and self.finished_s > 0 else 0.0

    def count(self, end: End) -> int:
        return sum(trip.end is end for trip in self.trips)
