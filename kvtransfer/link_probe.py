"""The receiver's short look at a new sender's link, before the first block crosses it."""

from __future__ import annotations

import time

from kvtransfer.arena import BufferPool
from kvtransfer.chooser import FASTEST, Link
from kvtransfer.link_meter import PROBE_BYTES
from kvtransfer.transports import FetchLost, Source

_SMALL_BYTES = 4096
_SMALL_FETCHES = 3  # the first one may still set the connection up


def probe_link(source: Source, pool: BufferPool, *, timeout_s: float) -> Link | None:
    """Fetches from the start of the peer's memory, whatever lies there, into a landing buffer that is freed again.

    Blocks for a few fetches, :data:`PROBE_BYTES` in all but the last of them nearly nothing; None when no landing
    buffer is free. Raises :class:`FetchLost`: a link that cannot be probed carries no blocks either.
    """
    region = pool.take(PROBE_BYTES)
    if region is None:
        return None
    try:
        small_s = [_timed(source, _SMALL_BYTES, region.offset, timeout_s) for _ in range(_SMALL_FETCHES)]
        large_s = _timed(source, PROBE_BYTES, region.offset, timeout_s)
    except FetchLost as lost:
        if lost.ended is None:
            pool.give(region)
        else:
            pool.quarantine(region, lost.ended)
        raise
    pool.give(region)
    latency_s = min(small_s)
    return Link(PROBE_BYTES / max(large_s - latency_s, PROBE_BYTES / FASTEST), latency_s)


def _timed(source: Source, nbytes: int, at: int, timeout_s: float) -> float:
    started = time.perf_counter()
    source.fetch(0, nbytes, at, timeout_s)
    return time.perf_counter() - started
