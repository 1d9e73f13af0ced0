"""What router and workers say to each other on the token plane: one multiplexed connection per router-worker pair.

    router ──Reserve──► decode     the decode worker keeps pages and grants a Ticket, or Failed
    router ──Prefill──► prefill    with the Ticket; answered by Tokens (the first token), Report, then Handed or Failed
    router ──Decode───► decode     compute the whole sequence there, without a handoff
    router ──Cancel───► both       free everything of this request; no answer
    router ──WatchCache► both      answered by CacheEvents with all that the prefix cache holds, then with every change
    worker ──Tokens───► router     one frame per engine step with every new token for that router
    worker ──Load─────► router     pushed on change and as a heartbeat
    worker ──Draining─► router     I leave: no new requests; those I have end here, or fail when my grace is over
    doctor ──Inspect──► both       answered by Inspected
    doctor ──Probe────► decode     a small lease of no request: Granted, then ProbeLanded or Failed
    doctor ──Probe────► prefill    with that Ticket; answered by ProbeSent or Failed

The worker speaks first, with Hello. The end of the stream is the failure signal: each side frees what it held for the
other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.host import HostFacts
from baton.records import Registry
from baton.request import TokenEvent, Work

HEARTBEAT_S = 0.5
HANDOFF_LOST = "handoff_lost"  # the reason of a Failed for which either of two workers may be to blame


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a worker on every new connection. ``generation`` is random per process: a recycled port shows."""

    role: str  # "prefill" or "decode"
    worker_id: str
    generation: str
    layout: str  # KVLayout.family
    dtype: str  # of compute and KV


@dataclass(frozen=True, slots=True)
class Ticket:
    """A decode worker's permission to hand it one request's KV: where to, for which attempt, in which form."""

    request_id: str
    epoch: int  # attempt number; a message of another epoch is refused
    host: str  # control address of the decode worker's receiver
    port: int
    generation: str
    layout: str
    codec: str  # of every block, or "auto": any that the floor allows
    transport: str
    floor: str = "exact"


@dataclass(frozen=True, slots=True)
class Reserve:
    work: Work
    epoch: int
    codec: str
    floor: str = "exact"


@dataclass(frozen=True, slots=True)
class Granted:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Prefill:
    work: Work
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Decode:
    work: Work


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Tokens:
    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Stage seconds that only this worker could measure (see ``baton.ledger``)."""

    request_id: str
    stages: dict[str, float]
    transfer_busy_s: float = 0.0
    transfer_bytes: int = 0
    codec_tokens: dict[str, int] = field(default_factory=dict)  # (layer, token) pairs that crossed in each codec
    carrier: str = ""  # what moved the bytes, as the transport itself says


@dataclass(frozen=True, slots=True)
class Handed:
    """The prefill worker's part is over: the decode worker has landed everything."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """This worker gave the request up and holds nothing of it any more. ``code`` is a gRPC status name."""

    request_id: str
    code: str
    message: str
    field: str = ""
    retry_after_ms: int = 0
    reason: str = ""  # in words of [a-z_], for counting


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker holds now. All counts of held things return to zero when it is idle."""

    waiting: int  # sequences not yet scheduled
    waiting_tokens: int  # prompt tokens not yet computed
    running: int
    pages_used: int
    pages_total: int
    handoffs: int  # leases held (decode) or handoffs being sent (prefill)
    buffer_bytes_used: int  # landing (decode) or staging (prefill)
    buffer_bytes_total: int
    buffer_bytes_quarantined: int
    pages_high_water: int = 0
    pages_cached: int = 0  # in the prefix cache, used or free: unlike the others it stays when the worker is idle
    prompt_token_s: float = 0.0  # what a prompt token cost lately, beside whatever else ran; 0 while none was computed
    connections_refused: int = 0  # since the start: connections that did not prove the cluster key
    step_s: float = 0.0  # what a step of decodes cost lately, apart from its sequences; 0 while none was computed
    sequence_s: float = 0.0  # what each sequence added to such a step
    prefix_lookup_tokens: int = 0  # since the start: of sequences that got pages, so looked up in the prefix cache
    prefix_hit_tokens: int = 0  # of these, found there
    preemptions: int = 0  # since the start: sequences that lost their pages and were computed again


@dataclass(frozen=True, slots=True)
class Draining:
    """The worker finishes what it has and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Inspect:
    request_id: str


@dataclass(frozen=True, slots=True)
class Inspected:
    request_id: str
    host: HostFacts


@dataclass(frozen=True, slots=True)
class Probe:
    """Hand over about ``kv_bytes`` of a known pattern: without a ticket land them, with one send them.

    Either worker takes either side, so that a pair is proven both ways. Cancel and the connection's end give it up.
    """

    request_id: str
    kv_bytes: int  # before encoding; both sides make the same whole number of tokens of it
    codec: str
    budget_s: float
    ticket: Ticket | None


@dataclass(frozen=True, slots=True)
class ProbeSent:
    """The sending side of a probe that landed."""

    request_id: str
    setup_s: float  # until the first token had landed, connecting included
    latency_s: float  # of one token's KV, from the push to its last acknowledgement: the best of a few
    seconds: float  # of the remaining tokens together
    kv_bytes: int  # of those, before encoding
    link_bytes_per_s: float  # of fetches alone, without encoding and landing
    link_latency_s: float


@dataclass(frozen=True, slots=True)
class ProbeLanded:
    """The landing side of a probe that landed."""

    request_id: str
    exact: bool  # what landed is what was sent, to the last bit
    wire_bytes: int
    tcp_bytes: int  # that this process received over TCP meanwhile, as the kernel counts
    transport: str  # as configured there
    carrier: str  # what it uses, as the transport itself says


@dataclass(frozen=True, slots=True)
class WatchCache:
    """The router wants to know what the worker's prefix cache holds, from now on; said again, everything anew."""


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Blocks of tokens (``baton.blocks``) that the worker's prefix cache holds or no longer holds.

    reset: what was known before is void, and ``added`` is all there is. Otherwise ``sequence`` is one more than that of
    the record before, or something was missed.
    """

    sequence: int
    reset: bool
    added: tuple[int, ...]
    removed: tuple[int, ...]


PLANE = Registry(
    Reserve, Prefill, Decode, Cancel, Hello, Granted, Tokens, Report, Handed, Failed, Load, Draining,
    Inspect, Inspected, Probe, ProbeSent, ProbeLanded, WatchCache, CacheEvents,
)  # fmt: skip
