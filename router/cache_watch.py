"""One worker's cache events on their way into the index, asked for again where some were missed."""

from __future__ import annotations

from collections.abc import Callable

from baton.messages import CacheEvents
from router.prefix_index import PrefixIndex


class CacheWatch:
    """From :meth:`begin` on, ``index`` knows under ``name`` what the worker tells. ``ask`` sends it ``WatchCache``."""

    def __init__(self, index: PrefixIndex, name: str, ask: Callable[[], None]) -> None:
        self._index, self._name, self._ask = index, name, ask
        self._waits = False  # for a reset; what comes before it builds on what was missed

    def begin(self) -> None:
        self._waits = True
        self._ask()

    def told(self, events: CacheEvents) -> None:
        if self._waits and not events.reset:
            return
        self._waits = False
        if not self._index.apply(self._name, events):
            self.begin()

    def end(self) -> None:
        """The worker is gone, and nobody holds what it held."""
        self._index.forget(self._name)
