"""A link's bandwidth and latency from fetches that happened: how many bytes each had, and how long it took.

A fetch of x bytes takes ``l + x / B``. Sizes tell the two apart: where the largest fetches of the window are at least
half as large again as the smallest, a line goes through the medians of the small and of the large ones (Tukey's
resistant line); where all are alike, l is the probe's. B is then the median rate, of the large ones or of all. Medians,
because a thread that lost its core for a moment must not look like a slow link.

The window keeps the last eight fetches of each size, sizes being alike within a factor of four. A link that is shaped
by a token bucket, as virtual machines' are, carries small fetches with pauses between as fast as if it were not: only
large ones tell what it sustains, and they must not be forgotten over many small ones. After a thousand more, they are.

The same line tells what fetches take a processor: its seconds each, and bytes in such a second.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from statistics import median

from kvtransfer.chooser import Link, Speed

OF_A_SIZE = 8
MEMORY = 1024
UNMEASURED = Link(bytes_per_s=1e10, latency_s=5e-5)  # until the probe has answered, nothing speaks for compressing
PROBE_BYTES = 256 << 10
_APART = 1.5
_LEAST = 2  # fetches of either size, for a line
_EACH, _EVERY = 8, 4  # the first fetches renew the estimate each, then every fourth one does: it is asked for often
_FASTEST = 1e13  # bytes per second; what looks faster was measured too coarsely


class LinkMeter:
    """One link. Bounded: the last few fetches of each size."""

    def __init__(self) -> None:
        self._sizes: dict[int, deque[tuple[int, int, float]]] = {}  # number, bytes and seconds of fetches, by size
        self._count = 0
        self._latency_s = UNMEASURED.latency_s
        self._link: Link | None = UNMEASURED

    def probed(self, link: Link) -> None:
        """A new connection's probe found ``link``; what was measured since the last one stays in the window."""
        self._latency_s = link.latency_s
        self.fetched(PROBE_BYTES, link.latency_s + PROBE_BYTES / link.bytes_per_s)

    def fetched(self, nbytes: int, seconds: float) -> None:
        """One fetch took ``seconds``. What the other end says is not trusted: nonsense is ignored."""
        if nbytes > 0 and 0.0 < seconds < math.inf:
            self._count += 1
            alike = self._sizes.setdefault(nbytes.bit_length() // 2, deque(maxlen=OF_A_SIZE))
            alike.append((self._count, nbytes, seconds))
            if self._count <= _EACH or self._count % _EVERY == 0:
                self._link = None

    def link(self) -> Link:
        """The estimate."""
        if self._link is None:
            oldest = self._count - MEMORY
            window = [(x, t) for alike in self._sizes.values() for number, x, t in alike if number > oldest]
            self._link = _fit(window, self._latency_s)
        return self._link


class WorkMeter:
    """Processor time that moving bytes takes. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._meter = LinkMeter()

    def took(self, nbytes: int, cpu_s: float) -> None:
        with self._lock:
            self._meter.fetched(nbytes, cpu_s)

    def cost(self) -> Speed | None:
        """Processor seconds for each fetch, and bytes in one; None before the first."""
        with self._lock:
            line = self._meter.link()
        return None if line is UNMEASURED else Speed(line.latency_s, line.bytes_per_s)


def _fit(fetches: list[tuple[int, float]], latency_s: float) -> Link:
    """A line through ``fetches``; ``latency_s`` is used where sizes cannot tell."""
    sizes = [nbytes for nbytes, _ in fetches]
    middle = math.sqrt(min(sizes) * max(sizes))
    small, large = [one for one in fetches if one[0] < middle], [one for one in fetches if one[0] >= middle]
    if max(sizes) >= _APART * min(sizes) and min(len(small), len(large)) >= _LEAST:
        latency_s = _intercept(small, large, latency_s)
        fetches = large
    latency_s = min(latency_s, *(seconds for _, seconds in fetches))
    rate = median(max(seconds - latency_s, nbytes / _FASTEST) / nbytes for nbytes, seconds in fetches)
    return Link(1 / rate, latency_s)


def _intercept(small: list[tuple[int, float]], large: list[tuple[int, float]], latency_s: float) -> float:
    x0, x1 = (median(nbytes for nbytes, _ in half) for half in (small, large))
    t0, t1 = (median(seconds for _, seconds in half) for half in (small, large))
    if x1 <= x0 or t1 <= t0:
        return latency_s
    return max(0.0, t0 - x0 * (t1 - t0) / (x1 - x0))
