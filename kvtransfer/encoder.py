"""The sender's thread: gathers finished spans, encodes them into staging memory and signs them, oldest handoff first.
Spans that lie in an accelerator's pages are encoded there, where it has the codec, and leave it as encoded bytes.

Neither the engine's thread nor the event loop ever waits for staging: a span that finds no room waits here until an
acknowledgement frees some, or until its handoff is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
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
from kvtransfer.protocol import Acks, Block, block_digest, block_tokens
from kvtransfer.route import Ratios, Route
from kvtransfer.signing import BlockKey

log = logging.getLogger(__name__)

_MOST_COUNTED = 64  # handoffs, in a load
_CHOSEN_FOR = 4  # blocks of a handoff, if so many wait already: choosing takes up to half as long as copying one

Gather: TypeAlias = Callable[[int, int, int], tuple[Tensor, Tensor] | Rows]


@dataclass(slots=True, eq=False)
class Feed:
    """One handoff's spans on their way into staging. Everything in it is guarded by the encoder's lock."""

    dispatch: Dispatch
    allowed: tuple[str, ...]  # codecs
    peer: str  # whose acknowledgements free this handoff's staging
    route: Route
    gather: Gather
    on_staged: Callable[[Block], None]  # called on the encoder's thread
    on_idle: Callable[[], None]  # the last span is gathered, or dropped
    on_failed: Callable[[str], None]
    spans: deque[Span] = field(default_factory=deque)
    regions: dict[int, Region] = field(default_factory=dict)  # seq -> staged and unacknowledged
    gathering: bool = False
    queued_tokens: int = 0  # (layer, token) pairs in ``spans``
    began_at: float = 0.0  # the first span was pushed
    pushed_at: float = 0.0  # the last one was
    first_pairs: int = 0  # (layer, token) pairs of the first push
    codec: str = ""  # the last choice
    held: int = 0  # spans for which it still holds

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
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One span with room for it in staging."""

    feed: Feed
    span: Span
    codec: str
    region: Region
    started_at: float


class Encoder:
    def __init__(
        self, layout: KVLayout, staging: BufferPool, ratios: Ratios, key: BlockKey | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:  # fmt: skip
        """``ratios`` and every feed's route are guarded by ``changed`` from here on; ``key`` makes digests keyed;
        ``accelerator`` encodes what its kernels can of feeds whose KV is in pages."""
        self._layout, self._staging, self._ratios, self._key = layout, staging, ratios, key
        self._codecs = {name: make_codec(name, layout) for name in CODECS}
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

    def acknowledge(self, feed: Feed, acks: Acks) -> None:
        with self.changed:
            nbytes = 0
            for seq in acks.seqs:
                if feed.dispatch.ack(seq):
                    region = feed.regions.pop(seq)
                    nbytes += region.nbytes
                    self._free(feed, region)
            feed.route.acknowledged(acks, nbytes)
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
                nbytes, digest = self._encode(job)
            except Exception as error:
                log.exception("%s: cannot encode layer %d", job.feed.dispatch.request_id, job.span.layer)
                self._failed(job, f"cannot encode: {error}")
            else:
                self._staged(job, nbytes, digest)

    def _next(self) -> Job | None:
        """The oldest span for which there is room, waiting for one; None when the encoder closes."""
        with self.changed:
            while not self._closing:
                for feed in self._waiting:
                    region = self._room(feed)
                    if region is not None:
                        return self._job(feed, region, time.monotonic())
                self.changed.wait(1.0)
            return None

    def _job(self, feed: Feed, region: Region, now: float) -> Job:
        """The feed's next span, in the codec that suits what is known now."""
        span = feed.spans.popleft()
        feed.queued_tokens -= span.count
        feed.gathering = True
        if len(feed.allowed) > 1 and not feed.held:
            feed.codec = self._choose(feed, span, region, now)
            feed.held = min(_CHOSEN_FOR, 1 + len(feed.spans))
        feed.held = max(0, feed.held - 1)
        if not feed.spans:
            del self._waiting[feed]
        return Job(feed, span, feed.codec or feed.allowed[0], region, now)

    def _choose(self, feed: Feed, span: Span, region: Region, now: float) -> str:
        active = list(islice(self._waiting, _MOST_COUNTED))  # this feed among them, unless it is a later one
        load = Load(encode=len(active), wire=max(1, sum(other.peer == feed.peer for other in active)))
        backlog_bytes = self._held[feed.peer] - region.nbytes
        ahead = feed.ahead(span, self._layout, backlog_bytes=backlog_bytes, now=now)
        return feed.route.pick(feed.allowed, ahead, load) or "raw"

    def _room(self, feed: Feed) -> Region | None:
        """For the feed's next span in any codec it may use."""
        count = feed.spans[0].count
        nbytes = max(self._codecs[codec].bound(count) for codec in feed.allowed)
        # One peer that acknowledges nothing must not stop the handoffs to the others.
        share = self._staging.memory.nbytes // (1 if len(self._feeds) <= 1 else 2)
        if self._held[feed.peer] and self._held[feed.peer] + nbytes > share:
            return None
        region = self._staging.take(nbytes)
        if region is not None:
            self._held[feed.peer] += region.nbytes
        return region

    def _encode(self, job: Job) -> tuple[int, bytes]:
        """Bytes written to the job's region, and their digest."""
        feed, span = job.feed, job.span
        kv = feed.gather(span.layer, span.start, span.count)
        view = self._staging.memory.view(job.region.offset, job.region.nbytes)
        after = feed.dispatch.coverage.tokens - span.start - span.count
        if isinstance(kv, Rows) and (paged := self._paged.get(job.codec)) is not None:
            nbytes = paged.encode(kv.layer, kv.slots, view, before=span.start, after=after)
        else:
            keys, values = kv.gather() if isinstance(kv, Rows) else kv
            nbytes = self._codecs[job.codec].encode(keys, values, view, before=span.start, after=after)
        digest = block_digest(
            view[:nbytes], request_id=feed.dispatch.request_id, epoch=feed.dispatch.epoch,
            layout=self._layout.fingerprint, layer=span.layer, start=span.start, count=span.count, codec=job.codec,
            key=self._key,
        )  # fmt: skip
        return nbytes, digest

    def _staged(self, job: Job, nbytes: int, digest: bytes) -> None:
        feed, span, dispatch, now = job.feed, job.span, job.feed.dispatch, time.monotonic()
        block = None
        with self.changed:
            feed.gathering = False
            idle = feed.idle
            if dispatch.outcome is not None:
                self._free(feed, job.region)
            else:
                kept = self._staging.shrink(job.region, nbytes)
                self._held[feed.peer] -= job.region.nbytes - kept.nbytes
                work_s = now - job.started_at
                self._ratios.encoded(job.codec, span.count * self._layout.layer_token_bytes, nbytes, work_s)
                seq = dispatch.staged(work_s=work_s, now=now)
                feed.regions[seq] = kept
                block = Block(
                    dispatch.request_id, dispatch.epoch, seq, span.layer, span.start, span.count,
                    job.codec, kept.offset, nbytes, digest,
                )  # fmt: skip
        if block is not None:
            feed.on_staged(block)
        if idle:
            feed.on_idle()

    def _failed(self, job: Job, reason: str) -> None:
        with self.changed:
            job.feed.gathering = False
            self._free(job.feed, job.region)
        job.feed.on_failed(reason)
        job.feed.on_idle()
