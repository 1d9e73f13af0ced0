"""What router and workers say to each other on the token plane: one multiplexed connection per router-worker pair.

    router ──Reserve──► decode     the decode worker keeps pages and grants a Ticket, or Failed
    router ──Prefill──► prefill    with the Ticket; answered by Tokens (the first token), Report, then Handed or Failed
    router ──Decode───► decode     compute the whole sequence there, without a handoff
    router ──Cancel───► both       free everything of this request; no answer
    worker ──Tokens───► router     one frame per engine step with every new token for that router
    worker ──Load─────► router     pushed on change and as a heartbeat

The worker speaks first, with Hello. The end of the stream is the failure signal: each side frees what it held for the
other.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.records import Registry
from baton.request import TokenEvent, Work

HEARTBEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a worker on every new connection. ``generation`` is random per process: a recycled port shows."""

    role: str  # "prefill" or "decode"
    worker_id: str
    generation: str
    layout: str  # KVLayout.fingerprint
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
    codec: str
    transport: str


@dataclass(frozen=True, slots=True)
class Reserve:
    work: Work
    epoch: int
    codec: str


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


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker holds now. All counters of held things return to zero when it is idle."""

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


PLANE = Registry(Reserve, Prefill, Decode, Cancel, Hello, Granted, Tokens, Report, Handed, Failed, Load)
