"""A worker's prefix cache as its routers hear of it: all of it when they ask, then every change."""

from __future__ import annotations

from baton.blocks import BlockJournal
from baton.errors import Unavailable
from baton.frames import FrameStream


class CacheFeed:
    """Tells the connections that asked by ``WatchCache``. One event loop."""

    def __init__(self, journal: BlockJournal) -> None:
        self._journal = journal
        self._watchers: set[FrameStream] = set()

    def watch(self, link: FrameStream) -> None:
        """From now on ``link`` hears of every change; asked again, it gets everything anew."""
        self._watchers.add(link)
        self._send(link, self._journal.snapshot())

    def gone(self, link: FrameStream) -> None:
        self._watchers.discard(link)

    def push(self) -> None:
        """Sends what has changed since the last call."""
        events = self._journal.take()
        if events is not None:
            for link in list(self._watchers):
                self._send(link, events)

    def _send(self, link: FrameStream, record: object) -> None:
        try:
            link.send(record)
        except Unavailable:
            link.abort()
