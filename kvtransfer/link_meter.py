"""A link's bandwidth and latency from fetches that happened: how many bytes each had, and how long it took.

A fetch of x bytes takes ``l + x / B``. Sizes tell the two apart: where the largest blocks of the window are at least
half as large again as the smallest, a line goes through the medians of both halves (Tukey's resistant line); where
all are alike, l is the probe's. B is then the median rate, of the larger half or of all. Medians, because a thread that
lost its core for a moment must not look like a slow link. Seven slow blocks in a row do: the window has twelve.
"""

from __future__ import annotations

import math
from collections import deque
from operator import itemgetter
from statistics import median

from kvtransfer.chooser import Link

WINDOW = 12
UNMEASURED = Link(bytes_per_s=1e10, latency_s=5e-5)  # until the probe has answered, nothing speaks for compressing
PROBE_BYTES = 256 << 10
_APART = 1.5
_FASTEST = 1e13  # bytes per second; what looks faster was measured too coarsely


class LinkMeter:
    """One link. Bounded: the last fetches only."""

    def __init__(self) -> None:
        self._fetches: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._latency_s = UNMEASURED.latency_s
        self._link: Link | None = UNMEASURED

    def probed(self, link: Link) -> None:
        """A new connection's probe found ``link``; what was measured since the last one stays in the window."""
        self._latency_s = link.latency_s
        self.fetched(PROBE_BYTES, link.latency_s + PROBE_BYTES / link.bytes_per_s)

    def fetched(self, nbytes: int, seconds: float) -> None:
        """One fetch took ``seconds``. What the other end says is not trusted: nonsense is ignored."""
        if nbytes > 0 and 0.0 < seconds < math.inf:
            self._fetches.append((nbytes, seconds))
            self._link = None

    def link(self) -> Link:
        """The estimate."""
        if self._link is None:
            self._link = _fit(sorted(self._fetches, key=itemgetter(0)), self._latency_s)
        return self._link


def _fit(fetches: list[tuple[int, float]], latency_s: float) -> Link:
    """``fetches`` by rising size; ``latency_s`` is used where sizes cannot tell."""
    if fetches[-1][0] >= _APART * fetches[0][0]:
        middle = len(fetches) // 2
        latency_s = _intercept(fetches[:middle], fetches[middle:], latency_s)
        fetches = fetches[middle:]
    latency_s = min(latency_s, *(seconds for _, seconds in fetches))
    rate = median(max(seconds - latency_s, nbytes / _FASTEST) / nbytes for nbytes, seconds in fetches)
    return Link(1 / rate, latency_s)


def _intercept(small: list[tuple[int, float]], large: list[tuple[int, float]], latency_s: float) -> float:
    x0, x1 = (median(nbytes for nbytes, _ in half) for half in (small, large))
    t0, t1 = (median(seconds for _, seconds in half) for half in (small, large))
    if x1 <= x0 or t1 <= t0:
        return latency_s
    return max(0.0, t0 - x0 * (t1 - t0) / (x1 - x0))
