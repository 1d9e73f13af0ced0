"""From measured requests to percentiles, attainment and goodput. Pure.

TTFT: due time to first token. TPOT: mean time per token after the first. ITL: each single gap; tokens that arrive in
one response have gaps of 0. E2E: due time to last token. All count from the moment a request was *due*, not from when
it was sent: a client that falls behind must not hide it (both are recorded).

Goodput is the highest request rate at which at least 90 % of requests meet TTFT and TPOT together; refused and failed
requests miss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.ledger import STAGES

OK = "OK"
ATTAINMENT = 0.9
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Record:
    """One request as the client saw it. Times are seconds; ``status`` is a gRPC status name."""

    index: int
    due_s: float
    sent_s: float
    prompt_tokens: int
    output_tokens: int  # asked for
    status: str
    message: str = ""
    token_times_s: tuple[float, ...] = ()  # arrival of each output token, counted like due_s
    stages: Mapping[str, float] = field(default_factory=dict)
    transfer_busy_s: float = 0.0
    transfer_exposed_s: float = 0.0
    transfer_bytes: int = 0
    ended_s: float = 0.0  # counted like due_s
    reason: str = ""  # of google.rpc.ErrorInfo, of one that was refused

    @property
    def ok(self) -> bool:
        """It ended well and delivered every token that was asked for."""
        return self.status == OK and len(self.token_times_s) == self.output_tokens

    @property
    def lag_s(self) -> float:
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.due_s if self.token_times_s else math.inf

    @property
    def tpot_s(self) -> float:
        """0 for a single token: it has no pace to miss."""
        gaps = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / gaps if gaps > 0 else 0.0

    @property
    def itls_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times_s, self.token_times_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        return self.token_times_s[-1] - self.due_s if self.token_times_s else math.inf


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float
    tpot_s: float

    def met(self, record: Record) -> bool:
        """Both limits, by the same request."""
        return record.ok and record.ttft_s <= self.ttft_s and record.tpot_s <= self.tpot_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks (numpy's default); NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in ms; empty for no values."""
    if not values:
        return {}
    named = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {name: value * 1e3 for name, value in {"mean": sum(values) / len(values), **named}.items()}


def attainment(records: Sequence[Record], slo: Slo) -> float:
    """Share of all ``records`` that met the objective, in [0, 1]; 0 for none."""
    return sum(map(slo.met, records)) / len(records) if records else 0.0


def mean_stages(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds per stage over requests that ended well and carry a ledger; empty when there is none."""
    known = [record.stages for record in records if record.ok and record.stages]
    if not known:
        return {}
    return {name: sum(stages.get(name, 0.0) for stages in known) / len(known) for name in STAGES}


def summary(records: Sequence[Record], slo: Slo) -> dict[str, object]:
    """What one run showed; ``records`` without warm-up and without those an interrupt cut off."""
    good = [record for record in records if record.ok]
    span_s = max((record.token_times_s[-1] for record in good), default=0.0) - min(
        (record.due_s for record in records), default=0.0
    )
    busy_s = sum(record.transfer_busy_s for record in good)
    exposed_s = sum(record.transfer_exposed_s for record in good)
    return {
        "requests": len(records),
        "completed": len(good),
        "by_status": dict(Counter(record.status for record in records)),
        "span_s": span_s,
        "requests_per_s": len(good) / span_s if span_s > 0.0 else 0.0,
        "output_tokens_per_s": sum(record.output_tokens for record in good) / span_s if span_s > 0.0 else 0.0,
        "attainment": attainment(records, slo),
        "ttft_ms": distribution([record.ttft_s for record in good]),
        "tpot_ms": distribution([record.tpot_s for record in good if record.output_tokens > 1]),
        "itl_ms": distribution([gap for record in good for gap in record.itls_s]),
        "e2e_ms": distribution([record.e2e_s for record in good]),
        "client_lag_ms": distribution([record.lag_s for record in records]),
        "mean_stages_ms": {name: seconds * 1e3 for name, seconds in mean_stages(records).items()},
        "transfer_hidden_share": min(1.0, max(0.0, 1.0 - exposed_s / busy_s)) if busy_s > 0.0 else None,
        "transfer_bytes": sum(record.transfer_bytes for record in good),
    }


@dataclass(frozen=True, slots=True)
class Goodput:
    """``bounded``: some higher rate was tried and missed, so the true value lies between; else it is a lower bound."""

    rate_per_s: float
    bounded: bool


def goodput(points: Sequence[tuple[float, float]]) -> Goodput:
    """From (rate, attainment) pairs: the highest rate up to which every tried rate reached :data:`ATTAINMENT`."""
    best = 0.0
    for rate_per_s, share in sorted(points):
        if share < ATTAINMENT:
            return Goodput(best, bounded=True)
        best = rate_per_s
    return Goodput(best, bounded=False)
