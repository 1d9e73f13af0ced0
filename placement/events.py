"""Simulated time: what happens next, in an order that depends on nothing but the times and what was put in."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from enum import IntEnum


class Rank(IntEnum):
    """Who goes first at one and the same time. News reaches a worker before its step ends, so it joins the next."""

    CHANGE = 0  # failures, recoveries, scaling
    NEWS = 1  # arrivals and landed handoffs
    STEP = 2  # the end of a step


class Timeline:
    """A queue of actions. ``now_s`` is the time of the action that runs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, int, Callable[[], None]]] = []

    def at(self, time_s: float, rank: Rank, action: Callable[[], None]) -> None:
        """Runs ``action`` at ``time_s``, which must not lie in the past."""
        if time_s < self.now_s:
            raise ValueError(f"{time_s} s is before {self.now_s} s")
        heapq.heappush(self._queue, (time_s, rank, next(self._order), action))

    def step(self) -> bool:
        """Runs the next action; False when there is none."""
        if not self._queue:
            return False
        self.now_s, _, _, action = heapq.heappop(self._queue)
        action()
        return True
