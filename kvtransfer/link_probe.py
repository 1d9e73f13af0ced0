"""How long fetches take: each of them, and a short look at a new link before the first parcel crosses it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from baton.config_handoff import TlsConfig
from kvtransfer.arena import BufferPool, HostMemory
from kvtransfer.chooser import FASTEST, NOTHING, Ends, Link
from kvtransfer.link_meter import PROBE_BYTES, WorkMeter
from kvtransfer.processor import cores
from kvtransfer.transports import FetchLost, Source
from kvtransfer.transports.tcp import TcpExporter, TcpFetcher

_SMALL_BYTES = 4096
_SMALL_FETCHES = 3  # the first one may still set the connection up
_LARGE_BYTES, _MEASURED, _MEASURE_S = 4 << 20, 8, 5.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What one fetch took."""

    wall_s: float
    link_s: float  # of that, all but what the peer waited for a processor: a busy core must not look like a slow link
    cpu_s: float  # of the fetching thread


def timed_fetch(source: Source, offset: int, nbytes: int, at: int, timeout_s: float) -> Spent:
    """Fetches as :meth:`Source.fetch` does.

    What this thread itself waits for a processor is left in: bytes go on arriving meanwhile.
    """
    cpu_s, begun_s = time.thread_time(), time.perf_counter()
    peer_waited_s = source.fetch(offset, nbytes, at, timeout_s)
    wall_s, cpu_s = time.perf_counter() - begun_s, time.thread_time() - cpu_s
    return Spent(wall_s, max(wall_s - peer_waited_s, min(wall_s, cpu_s)), cpu_s)


def probe_link(source: Source, pool: BufferPool, *, timeout_s: float) -> Link | None:
    """Fetches from the start of the peer's memory, whatever lies there, into a landing buffer that is freed again.

    Blocks for a few fetches, :data:`PROBE_BYTES` in all but the last of them nearly nothing; None when no landing
    buffer is free. Raises :class:`FetchLost`: a link that cannot be probed carries no blocks either.
    """
    region = pool.take(PROBE_BYTES)
    if region is None:
        return None
    try:
        small_s = [timed_fetch(source, 0, _SMALL_BYTES, region.offset, timeout_s).link_s for _ in range(_SMALL_FETCHES)]
        large_s = timed_fetch(source, 0, PROBE_BYTES, region.offset, timeout_s).link_s
    except FetchLost as lost:
        if lost.ended is None:
            pool.give(region)
        else:
            pool.quarantine(region, lost.ended)
        raise
    pool.give(region)
    latency_s = min(small_s)
    return Link(PROBE_BYTES / max(large_s - latency_s, PROBE_BYTES / FASTEST), latency_s)


def measure_ends(transport: str, processors: float | None = None) -> Ends:
    """Workers like this process, or with so many ``processors``, and what moving bytes over TCP takes them. Other
    transports' ends are taken to do it unseen, as running workers take them until they have moved some."""
    have = cores() if processors is None else processors
    if transport != "tcp":
        return Ends(sender_cores=have, receiver_cores=have)
    memory, work = HostMemory(_LARGE_BYTES), WorkMeter()
    exporter = TcpExporter(memory, host="127.0.0.1", tls=TlsConfig())
    source = TcpFetcher(memory, tls=TlsConfig()).connect(exporter.address(), _MEASURE_S)
    for nbytes in _MEASURED * (_SMALL_BYTES, _LARGE_BYTES):
        work.took(nbytes, timed_fetch(source, 0, nbytes, 0, _MEASURE_S).cpu_s)
    source.close()
    exporter.close()
    return Ends(exporter.sending() or NOTHING, work.cost() or NOTHING, have, have)
