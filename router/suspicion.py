"""When a connected worker gets no new requests: it is silent, or it failed too often lately. Pure; one per worker.

A circuit breaker (Nygard, Release It!, ch. 5): closed, open for a while after too many failures, then given a chance;
the next failure opens it again, for longer.
"""

from __future__ import annotations

from collections import deque

from baton.messages import HEARTBEAT_S

SILENT_S = 2 * HEARTBEAT_S  # a stopped process is known after two heartbeats that did not come
STRIKES = 3  # failures within WINDOW_S open the breaker
WINDOW_S = 30.0
ONE_EVENT_S = 1.0  # whatever dies takes many requests with it
OPEN_S = (5.0, 10.0, 20.0, 40.0)  # for how long, each time in a row
FORGIVEN_S = 120.0  # without a failure the next opening is the first again


class Suspicion:
    """What a router holds against one worker."""

    def __init__(self, now_s: float) -> None:
        self._heard_s = now_s
        self._strikes: deque[float] = deque(maxlen=STRIKES)
        self._open_until_s = 0.0
        self._openings = 0

    def heard(self, now_s: float) -> None:
        """Something came from the worker."""
        self._heard_s = now_s

    def silent(self, now_s: float) -> bool:
        return now_s - self._heard_s > SILENT_S

    def strike(self, now_s: float) -> None:
        """A request failed for which the worker may be to blame, or it fell silent. Many at once are one event."""
        if self._strikes and now_s - self._strikes[-1] < ONE_EVENT_S:
            return
        if self._strikes and now_s - self._strikes[-1] > FORGIVEN_S:
            self._openings = 0
        self._strikes.append(now_s)
        trial = bool(self._openings) and now_s - self._open_until_s < WINDOW_S
        if trial or (len(self._strikes) == STRIKES and now_s - self._strikes[0] <= WINDOW_S):
            self._open_until_s = now_s + OPEN_S[min(self._openings, len(OPEN_S) - 1)]
            self._openings += 1
            self._strikes.clear()
            self._strikes.append(now_s)  # which the trial's failure will be measured from

    def shunned(self, now_s: float) -> bool:
        """Whether it gets no new requests as long as others can take them."""
        return self.silent(now_s) or now_s < self._open_until_s
