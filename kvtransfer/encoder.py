"""The sender's thread: gathers finished spans, encodes them into staging memory and signs them, oldest handoff first.
Spans that lie in an accelerator's pages are encoded there, where it has the codec, and leave it as encoded bytes.

Neither the engine's thread nor the event loop ever waits for staging: a span that finds no room waits here until an
acknowledgement frees some, or until its handoff is over. Spans that wait already leave together, in one parcel: taking
room, announcing, fetching and acknowledging would cost more than copying each of them does (docs/handoff.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import TypeAlias

from torch import Tensor

from baton.config_handoff import CODECS
from baton.layout import KVLayout
from kvtransfer.arena import BufferPool, Region
from kvtransfer.chooser import Ahead, Load
from kvtransfer.codecs import make_codec
from kvtransfer.coverage import Span
from kvtransfer.handoff import Dispatch
from kvtransfer.pages import Accelerator, Rows, lane_of, paged_codecs
from kvtransfer.protocol import MOST_BLOCKS, Ack, Block, Parcel, aligned, block_digest, block_tokens
from kvtransfer.route import Ratios, Route
from kvtransfer.signing import BlockKey

log = logging.getLogger(__name__)

_MOST_COUNTED = 64  # handoffs, in a load
_PARCEL_S = 1e-3  # of encoding: the link waits for the first parcel, and the receiver has the last one still to decode

Gather: TypeAlias = Callable[[int, int, int], tuple[Tensor, Tensor] | Rows]


@dataclass(slots=True, eq=False)
class Feed:
    """One handoff's spans on their way into staging. Everything in it is guarded by the encoder's lock."""

    dispatch: Dispatch
    allowed: tuple[str, ...]  # codecs
    peer: str  # whose acknowledgements free this handoff's staging
    route: Route
    gather: Gather
    on_staged: Callable[[Parcel], None]  # called on the encoder's thread
    on_idle: Callable[[], None]  # the last span is gathered, or dropped
    on_failed: Callable[[str], None]
    spans: deque[Span] = field(default_factory=deque)
    regions: dict[int, Region] = field(default_factory=dict)  # seq -> staged and unacknowledged
    gathering: bool = False
    queued_tokens: int = 0  # (layer, token) pairs in ``spans``
    began_at: float = 0.0  # the first span was pushed
    pushed_at: float = 0.0  # the last one was
    first_pairs: int = 0  # (layer, token) pairs of the first push

    @property
    def idle(self) -> bool:
        """Nothing of this handoff will be read from the caller's pages any more, unless more is pushed."""
        return not self.spans and not self.gathering

    def ahead(self, block: Span, layout: KVLayout, *, backlog_bytes: int, now: float) -> Ahead:
        """What this handoff still has to do from ``block`` on. Prefill is taken to go on at its pace from push to push;
        until there is a second one, as if the next came now."""
        coverage = self.dispatch.coverage
        pairs = coverage.missing + self.queued_tokens + block.count
        later = layout.layers * coverage.tokens - coverage.missing - self.first_pairs
        pace_s = (self.pushed_at - self.began_at) / later if later else (now - self.began_at) / self.first_pairs
        return Ahead(
            raw_bytes=pairs * layout.layer_token_bytes,
            blocks=-(-pairs // block.count),
            backlog_bytes=backlog_bytes,
            prefill_s=pace_s * coverage.missing,
            slack_s=self.dispatch.expires_at - now,
            together_s=_PARCEL_S,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """Spans of one parcel, with room for it in staging."""

    feed: Feed
    spans: tuple[Span, ...]
    codec: str
    region: Region
    started_at: float
    started_cpu_s: float  # of the encoder's thread


class Encoder:
    def __init__(
        self, layout: KVLayout, staging: BufferPool, ratios: Ratios, key: BlockKey | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        """``ratios`` and every feed's route are guarded by ``changed`` from here on; ``key`` makes digests keyed;
        ``accelerator`` encodes what its kernels can of feeds whose KV is in pages."""
        self._layout, self._staging, self._ratios, self._key = layout, staging, ratios, key
        self._fingerprint = layout.fingerprint
        self._codecs = {name: make_codec(name, layout) for name in CODECS}
        self._bound = cache(self._most_bytes)
        self._accelerator = accelerator
        self._paged = paged_codecs(accelerator, CODECS, layout)
        self._block_tokens = block_tokens(layout)
        self.changed = threading.Condition()
        self._waiting: dict[Feed, None] = {}  # feeds with spans, oldest first
        self._feeds: Counter[str] = Counter()  # by peer
        self._held: Counter[str] = Counter()  # staged bytes by peer
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-encode", daemon=True)
        self._thread.start()

    def add(self, feed: Feed) -> None:
        with self.changed:
            self._feeds[feed.peer] += 1

    def push(self, feed: Feed, span: Span) -> bool:
        """Queues ``span``, cut into blocks; False when that ended the handoff. Any thread; returns at once."""
        pieces = [
            Span(span.layer, start, min(self._block_tokens, span.start + span.count - start))
            for start in range(span.start, span.start + span.count, self._block_tokens)
        ]
        with self.changed:
            if feed.dispatch.outcome is not None:
                return True
            feed.pushed_at = time.monotonic()
            if not feed.began_at:
                feed.began_at, feed.first_pairs = feed.pushed_at, span.count
            for piece in pieces or [span]:
                if not feed.dispatch.push(piece):
                    return False
                feed.spans.append(piece)
                feed.queued_tokens += piece.count
            self._waiting[feed] = None
            self.changed.notify()
        return True

    def acknowledge(self, feed: Feed, ack: Ack) -> None:
        with self.changed:
            if feed.dispatch.ack(ack.seq):
                region = feed.regions.pop(ack.seq)
                self._free(feed, region)
                feed.route.acknowledged(ack, region.nbytes)
            self.changed.notify()

    def drop(self, feed: Feed) -> None:
        """The handoff is over: frees its staging and forgets its spans. A span being gathered now ends by itself."""
        with self.changed:
            feed.spans.clear()
            feed.queued_tokens = 0
            self._waiting.pop(feed, None)
            for region in feed.regions.values():
                self._free(feed, region)
            feed.regions.clear()
            self._feeds[feed.peer] -= 1
            if not self._feeds[feed.peer]:
                del self._feeds[feed.peer]
            self.changed.notify()

    def _free(self, feed: Feed, region: Region) -> None:
        self._held[feed.peer] -= region.nbytes
        self._staging.give(region)

    def close(self) -> None:
        with self.changed:
            self._closing = True
            self.changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with lane_of(self._accelerator):
            self._encode_all()

    def _encode_all(self) -> None:
        while (job := self._next()) is not None:
            try:
                blocks = self._encode(job)
            except Exception as error:
                log.exception("%s: cannot encode %s", job.feed.dispatch.request_id, job.spans)
                self._failed(job, f"cannot encode: {error}")
            else:
                self._staged(job, blocks)

    def _next(self) -> Job | None:
        """The oldest spans for which there is room, waiting for some; None when the encoder closes."""
        with self.changed:
            while not self._closing:
                for feed in self._waiting:
                    region = self._room(feed)
                    if region is not None:
                        return self._job(feed, region, time.monotonic())
                self.changed.wait(1.0)
            return None

    def _job(self, feed: Feed, region: Region, now: float) -> Job:
        """As many of the feed's next spans as ``region`` and a parcel hold, in the codec that suits now."""
        codec = self._choose(feed, region, now) if len(feed.allowed) > 1 else feed.allowed[0]
        spans = tuple(self._together(feed, codec, min(region.nbytes, feed.route.parcel_bytes)))
        feed.queued_tokens -= sum(span.count for span in spans)
        feed.gathering = True
        if not feed.spans:
            del self._waiting[feed]
        return Job(feed, spans, codec, region, now, time.thread_time())

    def _together(self, feed: Feed, codec: str, room: int) -> Iterator[Span]:
        """The feed's next span, and those behind it that fit the rest of a parcel; takes them out of its queue."""
        taken, left_s = 0, _PARCEL_S
        while feed.spans and taken < MOST_BLOCKS:
            span = feed.spans[0]
            encode_s = self._ratios.encode_s(codec, span.count * self._layout.layer_token_bytes)
            room, left_s = room - self._bound((codec,), span.count), left_s - encode_s
            if taken and (room < 0 or left_s < 0 or not encode_s):
                return
            yield feed.spans.popleft()
            taken += 1

    def _choose(self, feed: Feed, region: Region, now: float) -> str:
        active = list(islice(self._waiting, _MOST_COUNTED))  # this feed among them, unless it is a later one
        load = Load(encode=len(active), wire=max(1, sum(other.peer == feed.peer for other in active)))
        backlog_bytes = self._held[feed.peer] - region.nbytes
        ahead = feed.ahead(feed.spans[0], self._layout, backlog_bytes=backlog_bytes, now=now)
        return feed.route.pick(feed.allowed, ahead, load) or "raw"

    def _room(self, feed: Feed) -> Region | None:
        """For the feed's next spans in any codec it may use: as many as a parcel may hold, or the first alone."""
        # One peer that acknowledges nothing must not stop the handoffs to the others.
        share = self._staging.memory.nbytes // (1 if len(self._feeds) <= 1 else 2)
        most = min(feed.route.parcel_bytes, share - self._held[feed.peer])
        first = wanted = self._bound(feed.allowed, feed.spans[0].count)
        if self._held[feed.peer] and first > share - self._held[feed.peer]:
            return None
        for span in islice(feed.spans, 1, MOST_BLOCKS):
            more = self._bound(feed.allowed, span.count)
            if wanted + more > most:
                break
            wanted += more
        region = self._staging.take(wanted) or self._staging.take(first)
        if region is not None:
            self._held[feed.peer] += region.nbytes
        return region

    def _most_bytes(self, codecs: tuple[str, ...], count: int) -> int:
        """That a block of ``count`` tokens takes in any of ``codecs``, and up to the next one."""
        return aligned(max(self._codecs[codec].bound(count) for codec in codecs))

    def _encode(self, job: Job) -> tuple[Block, ...]:
        """What was written to the job's region."""
        view = self._staging.memory.view(job.region.offset, job.region.nbytes)
        blocks: list[Block] = []
        for span in job.spans:
            blocks.append(self._encode_block(job, span, view))
            view = view[aligned(blocks[-1].nbytes) :]
        return tuple(blocks)

    def _encode_block(self, job: Job, span: Span, into: memoryview) -> Block:
        """Encoded, and signed while it is in the core's cache."""
        dispatch, kv = job.feed.dispatch, job.feed.gather(span.layer, span.start, span.count)
        after = dispatch.coverage.tokens - span.start - span.count
        if isinstance(kv, Rows) and (paged := self._paged.get(job.codec)) is not None:
            nbytes = paged.encode(kv.layer, kv.slots, into, before=span.start, after=after)
        else:
            keys, values = kv.gather() if isinstance(kv, Rows) else kv
            nbytes = self._codecs[job.codec].encode(keys, values, into, before=span.start, after=after)
        digest = block_digest(
            into[:nbytes], request_id=dispatch.request_id, epoch=dispatch.epoch, layout=self._fingerprint,
            layer=span.layer, start=span.start, count=span.count, codec=job.codec, key=self._key,
        )  # fmt: skip
        return Block(span.layer, span.start, span.count, nbytes, digest)

    def _staged(self, job: Job, blocks: tuple[Block, ...]) -> None:
        feed, dispatch, now = job.feed, job.feed.dispatch, time.monotonic()
        parcel = None
        with self.changed:
            feed.gathering = False
            idle = feed.idle
            if dispatch.outcome is not None:
                self._free(feed, job.region)
            else:
                work_s = now - job.started_at
                seq = dispatch.staged(len(blocks), work_s=work_s, now=now)
                parcel = Parcel(dispatch.request_id, dispatch.epoch, seq, job.codec, job.region.offset, blocks)
                kept = feed.regions[seq] = self._staging.shrink(job.region, parcel.nbytes)
                self._held[feed.peer] -= job.region.nbytes - kept.nbytes
                raw_bytes = parcel.tokens * self._layout.layer_token_bytes
                cpu_s = time.thread_time() - job.started_cpu_s
                self._ratios.encoded(job.codec, len(blocks), raw_bytes, parcel.nbytes, cpu_s)
        if parcel is not None:
            feed.on_staged(parcel)
        if idle:
            feed.on_idle()

    def _failed(self, job: Job, reason: str) -> None:
        with self.changed:
            job.feed.gathering = False
            self._free(job.feed, job.region)
        job.feed.on_failed(reason)
        job.feed.on_idle()
