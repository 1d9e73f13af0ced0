"""What this router counts and times for its operators: plain numbers in closed tables. Pure; see ``router.metrics``.

Observing costs a bisection and two additions, and never looks a label up by its text per token: every table is made
when the router starts, or holds at most ``MOST_LABELS`` values that clients and workers cannot choose freely.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.ledger import STAGES, Ledger

# Upper bounds in seconds. TTFT, TPOT and duration: those of OpenTelemetry's GenAI conventions, and more at the ends.
STAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
TPOT_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 655.36)
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

OPERATIONS = ("chat", "text_completion")  # values of gen_ai.operation.name
MOST_LABELS = 32  # values of one label; what comes beyond them is counted as OTHER
OTHER = "other"


class Histogram:
    """How many observations fell below each of ``bounds``, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: above them all
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class Tally:
    """Sums by label values. The first ``most`` combinations are kept apart; all later ones are ``other``."""

    def __init__(self, *labels: str, most: int = MOST_LABELS) -> None:
        self.labels, self._most = labels, most
        self.sums: Counter[tuple[str, ...]] = Counter()

    def add(self, *values: str, amount: float = 1) -> None:
        key = values if values in self.sums or len(self.sums) < self._most else (OTHER,) * len(self.labels)
        self.sums[key] += amount  # type: ignore[assignment]  # a Counter of floats works as one of ints does


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a class of requests is promised, in seconds; 0: nothing."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def met(self, ttft_s: float, tpot_s: float) -> bool:
        """Jointly: the first token and the mean gap after it."""
        return (not self.ttft_s or ttft_s <= self.ttft_s) and (not self.tpot_s or tpot_s <= self.tpot_s)


class Served:
    """Times of the outputs of one kind of request, under the names of OpenTelemetry's GenAI conventions."""

    __slots__ = ("duration", "tpot", "ttft")

    def __init__(self) -> None:
        self.ttft, self.tpot, self.duration = Histogram(TTFT_S), Histogram(TPOT_S), Histogram(DURATION_S)


@dataclass(frozen=True, slots=True)
class Ended:
    """One output that ended with a last response. operation: one of ``OPERATIONS``."""

    operation: str
    slo_class: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    ledger: Ledger
    codec_tokens: Mapping[str, int]
    carrier: str

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 for a single one."""
        return (self.ledger.total_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class Meters:
    """One router's. Every method returns at once; all are called on the event loop."""

    def __init__(self, objectives: Mapping[str, Objectives]) -> None:
        """objectives: of each class of requests that the deployment knows."""
        self.objectives = objectives
        self.stages = {stage: Histogram(STAGE_S) for stage in STAGES}
        self.served = {operation: Served() for operation in OPERATIONS}
        self.prompt_tokens, self.output_tokens = Histogram(TOKENS), Histogram(TOKENS)
        self.judged = Counter(dict.fromkeys(objectives, 0))  # requests by class, refused and failed ones too
        self.kept = Counter(dict.fromkeys(objectives, 0))  # of them, those that met their objectives
        self.rejections = Tally("reason")
        self.failures = Tally("code")
        self.retries = Tally("reason")
        self.handoffs = Tally("transport", "carrier", "codec")
        self.handoff_bytes = Tally("transport", "carrier")
        self.codec_tokens = Tally("codec")  # (layer, token) pairs
        self.busy_s = 0.0  # encode, wire and land work of handoffs
        self.exposed_s = 0.0  # of it, what clients waited for

    def rejected(self, reason: str, slo_class: str = "", outputs: int = 1) -> None:
        """Turned away before it began. An overload is a miss of its class; what the client got wrong is not."""
        self.rejections.add(reason, amount=outputs)
        self._judge(slo_class, outputs)

    def failed(self, code: str, slo_class: str = "", outputs: int = 1) -> None:
        """Ended by an error after it was admitted; ``code``: gRPC's."""
        self.failures.add(code, amount=outputs)
        self._judge(slo_class, outputs)

    def retried(self, reason: str) -> None:
        """A worker or a handoff was lost, and the request goes on elsewhere."""
        self.retries.add(reason)

    def ended(self, one: Ended) -> None:
        """``one`` came to its end as the client wished."""
        ledger, served = one.ledger, self.served[one.operation]
        for stage, seconds in ledger.stages.items():
            self.stages[stage].observe(seconds)
        served.ttft.observe(one.ttft_s)
        served.duration.observe(ledger.total_s)
        if one.output_tokens > 1:
            served.tpot.observe(one.tpot_s)
        self.prompt_tokens.observe(one.prompt_tokens)
        self.output_tokens.observe(one.output_tokens)
        self._judge(one.slo_class, 1)
        objectives = self.objectives.get(one.slo_class)
        if objectives is not None and objectives.met(one.ttft_s, one.tpot_s):
            self.kept[one.slo_class] += 1
        self._handed(one)

    def _handed(self, one: Ended) -> None:
        ledger = one.ledger
        if not ledger.transfer_bytes:
            return
        carrier = one.carrier or "unknown"
        self.handoffs.add(
            ledger.transport, carrier, max(one.codec_tokens, key=one.codec_tokens.__getitem__, default="")
        )
        self.handoff_bytes.add(ledger.transport, carrier, amount=ledger.transfer_bytes)
        for codec, tokens in one.codec_tokens.items():
            self.codec_tokens.add(codec, amount=tokens)
        self.busy_s += ledger.transfer_busy_s
        self.exposed_s += ledger.transfer_exposed_s

    def _judge(self, slo_class: str, outputs: int) -> None:
        if slo_class in self.objectives:
            self.judged[slo_class] += outputs
