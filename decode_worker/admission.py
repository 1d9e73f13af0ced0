"""The line in front of a decode worker's pages: first come, a level of priority counting as time; bounded.

Waiting ages: who has waited ``aging_s`` longer stands before one whose priority is a level higher. The order of two is
the same whenever it is asked for, so the line needs no sorting anew.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from baton.errors import Overloaded
from baton.request import Work

T = TypeVar("T")

RETRY_AFTER_MS = 1000  # hint to clients when even the line is full: about one short answer


class Admission:
    """Lets requests try for room one at a time, in order, and again whenever something was freed."""

    def __init__(self, max_waiting: int, *, aging_s: float) -> None:
        self._max_waiting, self._aging_s = max_waiting, aging_s
        self._line: list[tuple[float, int]] = []  # (arrival in seconds less priority in seconds, arrival), sorted
        self._arrivals = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._line)

    async def admit(self, work: Work, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of the first ``attempt()`` that is not Overloaded; the caller bounds the wait by its deadline.

        Raises :class:`Overloaded` at once when the line is full.
        """
        if len(self._line) >= self._max_waiting:
            raise Overloaded(f"{len(self._line)} requests wait for KV pages already", retry_after_ms=RETRY_AFTER_MS)
        place = (time.monotonic() - work.priority * self._aging_s, next(self._arrivals))
        bisect.insort(self._line, place)
        try:
            while True:
                changed = self._changed
                if self._line[0] == place:
                    try:
                        return await attempt()
                    except Overloaded:
                        pass  # still no room; wait for the next release
                await changed.wait()
        finally:
            self._line.remove(place)
            self.freed()

    def freed(self) -> None:
        """Room or the order may have changed: whoever is first tries again."""
        self._changed.set()
        self._changed = asyncio.Event()
