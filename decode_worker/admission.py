"""The line in front of a decode worker's pages: highest priority first, then first come; bounded."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from baton.errors import Overloaded
from baton.request import Work

T = TypeVar("T")

RETRY_AFTER_MS = 1000  # hint to clients when even the line is full: about one short answer


class Admission:
    """Lets requests try for room one at a time, in order, and again whenever something was freed."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._line: list[tuple[int, int]] = []  # (-priority, arrival), sorted
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
        place = (-work.priority, next(self._arrivals))
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
