"""The life of one handoff, decided purely: messages and the time go in, state and an outcome come out.

    receiver, Lease                                         sender, Dispatch
    reserve ─► reserved ─begin─► sending ─┬─► landed        open ─► sending ─┬─► landed     Complete came
                  │                 │     ├─► lost(reason)         │         ├─► lost       refusal, dead peer, stall
                  └──── lease_s ────┴─────┴─► expired              └─────────┴─► expired    budget_s

Invariants: an outcome never changes; every (layer, token) is announced exactly once and a handoff lands only when all
of them have landed; a message of another epoch or another peer changes nothing but the count of refusals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton.config_handoff import codecs_allowed
from baton.errors import Overloaded
from baton.layout import KVLayout
from baton.request import TokenEvent
from kvtransfer.coverage import Coverage, Span
from kvtransfer.protocol import DIGEST_BYTES, MOST_BLOCKS, Begin, Commit, Complete, Parcel


@dataclass(frozen=True, slots=True)
class Landed:
    """Every token's KV is in the receiver's pages. Exposed seconds count from the sender's first token."""

    first: TokenEvent
    encode_s: float
    wire_s: float
    land_s: float
    busy_s: float  # all encode, wire and land work, hidden or not
    bytes: int  # encoded bytes that crossed the wire
    codec_tokens: Mapping[str, int] = field(default_factory=dict)  # (layer, token) pairs that crossed in each codec
    dtype: str = ""  # of the sender's KV; only the receiver is told


@dataclass(frozen=True, slots=True)
class Lost:
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The lease or the request's budget ran out."""

    reason: str


Outcome = Landed | Lost | Expired


@dataclass(frozen=True, slots=True)
class Limits:
    lease_s: float  # a reservation that nobody begins is freed after this long
    stall_s: float  # a peer without a sign of life for this long is lost


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the parcels of one sender may be like."""

    block: Callable[[str, int], int]  # most bytes of so many tokens in a codec; 0 where that cannot be
    parcel_bytes: int  # of a parcel with several blocks

    def refusal(self, parcel: Parcel) -> str:
        """What is wrong with what ``parcel`` claims of its blocks; empty when it may be."""
        if not 0 < len(parcel.blocks) <= MOST_BLOCKS:
            return f"{len(parcel.blocks)} blocks, at most {MOST_BLOCKS}"
        for block in parcel.blocks:
            most = self.block(parcel.codec, block.count)
            if not 0 < block.nbytes <= most:
                return f"{block.nbytes} bytes, at most {most}"
            if len(block.digest) != DIGEST_BYTES:
                return "no digest"
        if len(parcel.blocks) > 1 and parcel.nbytes > self.parcel_bytes:
            return f"{parcel.nbytes} bytes in {len(parcel.blocks)} blocks, at most {self.parcel_bytes}"
        return ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """One parcel is in the receiver's pages; times are readings of the receiver's clock."""

    seq: int
    nbytes: int
    fetched_at: float
    landed_at: float
    work_s: float  # fetching, verifying, decoding and writing it
    fetch_s: float = 0.0  # fetching alone, without waiting for a processor
    fetch_cpu_s: float = 0.0


class Lease:
    """One reservation of the receiver. ``peer`` numbers connections; 0 is nobody."""

    def __init__(
        self, request_id: str, epoch: int, *, layout: KVLayout, tokens: int, codec: str, floor: str = "exact",
        budget_s: float, limits: Limits, now: float,
    ) -> None:  # fmt: skip
        """``codec``: of every block, or "auto" for any that ``floor`` allows."""
        self.request_id, self.epoch, self.tokens, self.codec = request_id, epoch, tokens, codec
        self._allowed = codecs_allowed(codec, floor)
        self.peer, self._dtype = 0, ""
        self.outcome: Outcome | None = None
        self._limits = limits
        self._expires_at = now + budget_s
        self._renewed_at = now
        self._coverage = Coverage(layout.layers, tokens)
        self._announced = 0
        self._pending: dict[int, Parcel] = {}  # by seq
        self._codec_tokens: Counter[str] = Counter()
        self._commit: Commit | None = None
        self._committed_at = 0.0
        self._fetched_at = self._landed_at = -math.inf
        self._bytes, self._work_s = 0, 0.0

    def begin(self, peer: int, begin: Begin, now: float, dtype: str = "") -> None:
        """``dtype``: of the peer's KV."""
        if self.outcome is not None:
            return
        if self.peer:
            self.lose("begun twice")
        elif begin.tokens != self.tokens or begin.codec != self.codec:
            self.lose(f"begun as {begin.tokens} tokens in {begin.codec}, reserved {self.tokens} in {self.codec}")
        else:
            self.peer, self._dtype, self._renewed_at = peer, dtype, now

    def announce(self, parcel: Parcel, now: float, bounds: Bounds) -> bool:
        """True when ``parcel`` may be fetched; otherwise the handoff is lost, or was over before."""
        if self.outcome is not None:
            return False
        reason = self._refusal(parcel, bounds) or self._covered(parcel)
        if reason:
            self.lose(f"parcel {parcel.seq} refused: {reason}")
            return False
        self._announced += 1
        self._pending[parcel.seq] = parcel
        self._renewed_at = now
        return True

    def _refusal(self, parcel: Parcel, bounds: Bounds) -> str:
        if not self.peer:
            return "the handoff has not begun"
        if self._commit is not None:
            return "it follows the commit"
        if parcel.seq != self._announced:
            return f"expected {self._announced}"
        if parcel.codec not in self._allowed:
            return f"codec {parcel.codec}, reserved {', '.join(self._allowed)}"
        return bounds.refusal(parcel)

    def _covered(self, parcel: Parcel) -> str:
        spans = (Span(block.layer, block.start, block.count) for block in parcel.blocks)
        return next((reason for span in spans if (reason := self._coverage.add(span))), "")

    def landed(self, arrived: Arrived, now: float) -> None:
        if self.outcome is not None:
            return
        parcel = self._pending.pop(arrived.seq, None)
        if parcel is None:
            self.lose(f"parcel {arrived.seq} landed twice")
            return
        self._codec_tokens[parcel.codec] += parcel.tokens
        self._bytes += arrived.nbytes
        self._work_s += arrived.work_s
        self._fetched_at = max(self._fetched_at, arrived.fetched_at)
        self._landed_at = max(self._landed_at, arrived.landed_at)
        self._renewed_at = now
        self._settle_if_complete()

    def commit(self, commit: Commit, now: float) -> None:
        if self.outcome is not None:
            return
        if not self.peer or self._commit is not None or commit.parcels != self._announced or self._coverage.missing:
            self.lose(
                f"commit of {commit.parcels} parcels refused: {self._announced} announced, "
                f"{self._coverage.missing} (layer, token) pairs missing"
            )
            return
        self._commit, self._committed_at, self._renewed_at = commit, now, now
        self._settle_if_complete()

    def _settle_if_complete(self) -> None:
        commit = self._commit
        if commit is None or self._pending:
            return
        self.outcome = Landed(
            first=commit.first,
            encode_s=commit.encode_exposed_s,
            wire_s=max(0.0, self._fetched_at - self._committed_at),
            land_s=max(0.0, self._landed_at - max(self._fetched_at, self._committed_at)),
            busy_s=commit.encode_busy_s + self._work_s,
            bytes=self._bytes,
            codec_tokens=dict(self._codec_tokens),
            dtype=self._dtype,
        )

    def lose(self, reason: str) -> None:
        if self.outcome is None:
            self.outcome = Lost(reason)

    def tick(self, now: float, heard_at: float = -math.inf) -> None:
        """Ends a lease that ran out of time; ``heard_at``: when its peer last gave any sign of life."""
        if self.outcome is not None:
            return
        silent_s = now - max(self._renewed_at, heard_at)
        if now >= self._expires_at:
            self.outcome = Expired("the request's budget is used up")
        elif self.peer and silent_s >= self._limits.stall_s:
            self.lose(f"sender silent for {silent_s:.1f} s")
        elif not self.peer and silent_s >= self._limits.lease_s:
            self.outcome = Expired(f"nobody began within {self._limits.lease_s:g} s")


class Leases:
    """The leases of one receiver. A settled one costs no credit and is kept until it is forgotten."""

    def __init__(self, layout: KVLayout, limits: Limits) -> None:
        self._layout, self._limits = layout, limits
        self._leases: dict[str, Lease] = {}
        self._heard_at: dict[int, float] = {}  # by peer

    def reserve(
        self, request_id: str, epoch: int,
        *, tokens: int, codec: str, floor: str = "exact", budget_s: float, capacity: int, now: float,
    ) -> Lease:  # fmt: skip
        """A new lease; raises :class:`Overloaded` for the lease after ``capacity``, ValueError for a stale epoch."""
        known = self._leases.get(request_id)
        if known is not None and (known.outcome is None or known.epoch >= epoch):
            raise ValueError(f"{request_id}: epoch {epoch} after epoch {known.epoch}, which was not released")
        if self.active >= capacity:
            raise Overloaded(f"{self.active} handoffs under way, room for {capacity}", retry_after_ms=100)
        lease = self._leases[request_id] = Lease(
            request_id, epoch, layout=self._layout, tokens=tokens, codec=codec, floor=floor,
            budget_s=budget_s, limits=self._limits, now=now,
        )  # fmt: skip
        return lease

    @property
    def active(self) -> int:
        """Leases without an outcome: the credits in use."""
        return sum(lease.outcome is None for lease in self._leases.values())

    def find(self, request_id: str, epoch: int, peer: int) -> Lease | None:
        """The lease that a message of ``peer`` may change; None for a stale epoch or somebody else's lease."""
        lease = self._leases.get(request_id)
        return lease if lease is not None and lease.epoch == epoch and lease.peer in (0, peer) else None

    def of_peer(self, peer: int) -> list[Lease]:
        """Leases under way whose KV comes from ``peer``."""
        return [lease for lease in self._leases.values() if lease.peer == peer and lease.outcome is None]

    def forget(self, lease: Lease) -> None:
        """Drops a settled lease; ValueError while it is under way."""
        if lease.outcome is None:
            raise ValueError(f"{lease.request_id} is under way")
        if self._leases.get(lease.request_id) is lease:
            del self._leases[lease.request_id]

    def hear(self, peer: int, now: float) -> None:
        """``peer`` gave a sign of life, which renews every lease that it feeds."""
        self._heard_at[peer] = now

    def gone(self, peer: int) -> None:
        """``peer`` will not be heard again."""
        self._heard_at.pop(peer, None)

    def tick(self, now: float) -> list[Lease]:
        """The leases that ran out of time just now."""
        under_way = [lease for lease in self._leases.values() if lease.outcome is None]
        for lease in under_way:
            lease.tick(now, self._heard_at.get(lease.peer, -math.inf))
        return [lease for lease in under_way if lease.outcome is not None]


@dataclass(slots=True)
class Dispatch:
    """The sender's twin of a :class:`Lease`: what was pushed, what is staged and unacknowledged, how it ended."""

    request_id: str
    epoch: int
    coverage: Coverage
    expires_at: float
    outcome: Outcome | None = None
    first: TokenEvent | None = None
    finished_at: float = math.inf
    encode_exposed_s: float = 0.0
    encode_busy_s: float = 0.0
    unstaged: int = 0  # spans pushed and not yet staged
    announced: int = 0
    unacked: set[int] = field(default_factory=set)
    committed: bool = False

    def push(self, span: Span) -> bool:
        """True when ``span`` is to be encoded; a span that breaks the coverage loses the handoff."""
        if self.outcome is not None:
            return False
        reason = "it follows the last one" if self.first is not None else self.coverage.add(span)
        if reason:
            self.lose(f"push refused: {reason}")
            return False
        self.unstaged += 1
        return True

    def staged(self, spans: int, *, work_s: float, now: float) -> int:
        """So many spans are encoded into one parcel; returns the sequence number under which to announce it."""
        seq = self.announced
        self.announced += 1
        self.unstaged -= spans
        self.unacked.add(seq)
        self.encode_busy_s += work_s
        self.encode_exposed_s = max(0.0, now - self.finished_at)
        return seq

    def ack(self, seq: int) -> bool:
        """True when ``seq`` was outstanding, so that its staging may be freed; else the handoff is lost."""
        if seq in self.unacked:
            self.unacked.discard(seq)
            return True
        self.lose(f"parcel {seq} acknowledged, which is not outstanding")
        return False

    def finish(self, first: TokenEvent, now: float) -> None:
        if self.outcome is not None:
            return
        if self.coverage.missing or self.first is not None:
            self.lose(f"finished with {self.coverage.missing} (layer, token) pairs never pushed, or twice")
            return
        self.first, self.finished_at = first, now

    def commit(self, told: int) -> Commit | None:
        """The commit, once: when the first token is known, all spans are staged and the peer knows of all parcels."""
        if self.outcome is not None or self.first is None or self.unstaged or self.committed:
            return None
        if told != self.announced:
            return None
        self.committed = True
        return Commit(
            self.request_id, self.epoch, self.announced, self.first, self.encode_exposed_s, self.encode_busy_s
        )

    def complete(self, complete: Complete) -> None:
        if self.outcome is not None:
            return
        if not self.committed or self.first is None or self.unacked:
            self.lose("the receiver completed a handoff that is not")
            return
        self.outcome = Landed(
            self.first, self.encode_exposed_s, complete.wire_s, complete.land_s, complete.busy_s, complete.nbytes,
            complete.codec_tokens,
        )  # fmt: skip

    def lose(self, reason: str) -> None:
        if self.outcome is None:
            self.outcome = Lost(reason)

    def tick(self, now: float) -> None:
        if self.outcome is None and now >= self.expires_at:
            self.outcome = Expired("the request's budget is used up")
