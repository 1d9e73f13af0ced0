"""The sender's thread: gathers finished spans, encodes them into staging memory and signs them, oldest handoff first.

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
from typing import TypeAlias

from torch import Tensor

from baton.config import CODECS
from baton.layout import KVLayout
from kvtransfer.arena import BufferPool, Region
from kvtransfer.codecs import make_codec
from kvtransfer.coverage import Span
from kvtransfer.handoff import Dispatch
from kvtransfer.protocol import Block, block_digest, block_tokens
from kvtransfer.signing import BlockKey

log = logging.getLogger(__name__)

Gather: TypeAlias = Callable[[int, int, int], tuple[Tensor, Tensor]]


@dataclass(slots=True, eq=False)
class Feed:
    """One handoff's spans on their way into staging. Everything in it is guarded by the encoder's lock."""

    dispatch: Dispatch
    codec: str
    peer: str  # whose acknowledgements free this handoff's staging
    gather: Gather
    on_staged: Callable[[Block], None]  # called on the encoder's thread
    on_idle: Callable[[], None]  # the last span is gathered, or dropped
    on_failed: Callable[[str], None]
    spans: deque[Span] = field(default_factory=deque)
    regions: dict[int, Region] = field(default_factory=dict)  # seq -> staged and unacknowledged
    gathering: bool = False

    @property
    def idle(self) -> bool:
        """Nothing of this handoff will be read from the caller's pages any more, unless more is pushed."""
        return not self.spans and not self.gathering


@dataclass(frozen=True, slots=True)
class Job:
    """One span with room for it in staging."""

    feed: Feed
    span: Span
    region: Region
    started_at: float


class Encoder:
    def __init__(self, layout: KVLayout, staging: BufferPool, key: BlockKey | None = None) -> None:
        self._layout, self._staging, self._key = layout, staging, key
        self._codecs = {name: make_codec(name, layout) for name in CODECS}
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
            for piece in pieces or [span]:
                if not feed.dispatch.push(piece):
                    return False
                feed.spans.append(piece)
            self._waiting[feed] = None
            self.changed.notify()
        return True

    def acknowledge(self, feed: Feed, seqs: tuple[int, ...]) -> None:
        with self.changed:
            for seq in seqs:
                if feed.dispatch.ack(seq):
                    self._free(feed, feed.regions.pop(seq))
            self.changed.notify()

    def drop(self, feed: Feed) -> None:
        """The handoff is over: frees its staging and forgets its spans. A span being gathered now ends by itself."""
        with self.changed:
            feed.spans.clear()
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
                        span = feed.spans.popleft()
                        feed.gathering = True
                        if not feed.spans:
                            del self._waiting[feed]
                        return Job(feed, span, region, time.monotonic())
                self.changed.wait(1.0)
            return None

    def _room(self, feed: Feed) -> Region | None:
        nbytes = self._codecs[feed.codec].bound(feed.spans[0].count)
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
        keys, values = feed.gather(span.layer, span.start, span.count)
        view = self._staging.memory.view(job.region.offset, job.region.nbytes)
        after = feed.dispatch.coverage.tokens - span.start - span.count
        nbytes = self._codecs[feed.codec].encode(keys, values, view, before=span.start, after=after)
        digest = block_digest(
            view[:nbytes], request_id=feed.dispatch.request_id, epoch=feed.dispatch.epoch,
            layout=self._layout.fingerprint, layer=span.layer, start=span.start, count=span.count, codec=feed.codec,
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
                seq = dispatch.staged(work_s=now - job.started_at, now=now)
                feed.regions[seq] = kept
                block = Block(
                    dispatch.request_id, dispatch.epoch, seq, span.layer, span.start, span.count,
                    feed.codec, kept.offset, nbytes, digest,
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
